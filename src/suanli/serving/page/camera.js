// The camera, in a <video>: on, off, and one picture of what it sees.

const QUALITY = 0.92; // of the JPEG that is sent
const LONGEST = 1280; // px

// The word for why there is no camera, or null: it may be asked for.
export function whyNoCamera() {
  if (navigator.mediaDevices?.getUserMedia) return null;
  return window.isSecureContext ? "camera_absent" : "camera_insecure";
}

// Shows the camera, the one at the back of a phone. Raises an Error whose message is the word for the reason.
export async function turnOn(video) {
  const wanted = { facingMode: "environment", width: { ideal: LONGEST }, height: { ideal: 720 } };
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
    await video.play();
  } catch (error) {
    const reasons = { NotAllowedError: "camera_denied", SecurityError: "camera_denied", NotFoundError: "camera_none" };
    throw new Error(reasons[error.name] ?? "camera_busy");
  }
}

export function turnOff(video) {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
}

export function photograph(video) {
  const canvas = document.createElement("canvas");
  const scale = Math.min(1, LONGEST / Math.max(video.videoWidth, video.videoHeight));
  canvas.width = Math.round(video.videoWidth * scale);
  canvas.height = Math.round(video.videoHeight * scale);
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
}
