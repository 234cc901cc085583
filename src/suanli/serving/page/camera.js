// The camera in a <video>: on, off, and taking a picture.

const QUALITY = 0.92; // of the JPEG that is sent
const LONGEST = 1280; // px

// The key of the text that says why there is no camera, or null if the page may ask for it.
export function whyNoCamera() {
  if (navigator.mediaDevices?.getUserMedia) return null;
  return window.isSecureContext ? "camera_absent" : "camera_insecure";
}

// Shows the camera, on a phone the one at the back. Throws an Error whose message is the key of a text.
export async function turnOn(video) {
  const constraints = { facingMode: "environment", width: { ideal: LONGEST }, height: { ideal: 720 } };
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: constraints, audio: false });
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
