// The texts of the pages in English and Chinese, and the switch between them.
//
// An element's data-t is the key of its text. `say` also stores the values of the text in the element, so that the switch
// changes everything on the page, answers included. Values are always set as text, never as HTML.

const LANGUAGE = "suanli.language";

const WORDS = {
  en: {
    other: "中文",
    nav: "Pages",
    health: "Health",
    home: "Try it",
    model: "Model",
    input: "Input",
    sources: "Source of the image",
    draw: "Draw",
    picture: "Image",
    camera: "Camera",
    draw_area: "Drawing area: draw a digit with a mouse, a pen or a finger",
    draw_hint: "Draw a digit, 0 to 9",
    undo: "Undo",
    clear: "Clear",
    choose: "Choose images",
    drop: "or drop them here, or paste one",
    drop_now: "Drop to classify",
    drop_now_any: "Drop to send",
    choose_files: "Choose files",
    only_tensors: "This model reads tensors, which this page can't send.",
    camera_view: "What the camera sees",
    camera_on: "Turn the camera on",
    camera_off: "Turn off",
    camera_take: "Take photo",
    camera_live: "Keep answering",
    camera_is_off: "The camera is off. Its images are sent only to this server.",
    camera_asks: "Waiting for the camera…",
    camera_insecure:
      "Browsers allow the camera only on pages from https or localhost. Start the server with --tls-cert and " +
      "--tls-key, or choose an image instead: on a phone you can take a photo there.",
    camera_absent: "This browser gives pages no access to a camera. Choose an image instead.",
    camera_denied: "The camera is blocked for this page. Allow it in the browser's settings, then turn it on again.",
    camera_none: "No camera was found.",
    camera_busy: "The camera can't be started. Another program may be using it.",
    text: "Text",
    fields: "The columns of a row; an empty one is a missing value.",
    text_ask: "Classify",
    text_ask_any: "Send",
    text_hint: "or Ctrl + Enter",
    shell: "Do the same from a shell",
    shell_tensors: "Names and shapes of its tensors, from a shell",
    answers: "Answers",
    empty: "The most likely classes will appear here, with the time taken and the engine used.",
    empty_any: "The answer will appear here, with the time taken and the engine used.",
    forget: "Remove all answers",
    knows: "All {n} classes",
    knows_one: "The only class",
    more: "and {n} more",
    is_image: "Images, {width} × {height}, {colour}",
    is_text: "Texts",
    grey: "grey",
    colour: "colour",
    classes: "{n} classes",
    classes_one: "1 class",
    version: "version {version}",
    drawn: "Drawing",
    photographed: "Camera",
    pending: "Working…",
    took: "{server} on the server, {trip} round trip",
    by: "{engine} {precision}",
    by_model: "{model}, version {version}",
    result: "{name}: {answer}",
    result_many: "{n} of {all} answered",
    result_error: "{name}: no answer. {error}",
    no_answer: "No answer",
    nothing: "Nothing found",
    threshold: "Show boxes from",
    again: "Try again",
    again_in: "Try again in {n}\u00a0s",
    offline: "No connection to the server.",
    offline_still: "No connection to the server. Retrying automatically.",
    full: "The server has too many requests. It rejected this one so that the others stay fast.",
    not_ready: "The model is not ready.",
    large: "Too large for this server.",
    late: "The answer took too long.",
    refused: "The server rejected this input.",
    broken: "The server failed on this input.",
    key_wrong: "The server didn't accept the key.",
    loading: "The model is loading.",
    failed: "The model is not running.",
    draining: "The server is shutting down. It finishes open requests and accepts no new ones.",
    no_models: "The server has no model.",
    key_needed: "This server needs an API key.",
    key_use: "Use this key",
    key_kept: "Kept only in this tab, until it is closed.",
    key_checking: "Checking the key…",
    health_ready: "Ready",
    health_partly: "Partly ready",
    health_not: "Not ready",
    health_draining: "Shutting down",
    health_none: "No model",
    health_lost: "No connection",
    health_about: "suanli {version}, up for {time}. Refreshed every 2\u00a0s.",
    health_since: "These figures are {time} old.",
    table: "Models",
    state: "State",
    engine: "Engine",
    requests: "Requests",
    rate: "Per second",
    waiting: "Waiting",
    p50: "p50",
    p99: "p99",
    turned_away: "Rejected",
    errors: "Failed",
    restarts: "Restarts",
    state_ready: "ready",
    state_loading: "loading",
    state_failed: "failed",
    state_draining: "shutting down",
    seconds: "{n}\u00a0s",
    minutes: "{n}\u00a0min {s}\u00a0s",
    hours: "{n}\u00a0h {m}\u00a0min",
    days: "{n}\u00a0d {h}\u00a0h",
  },
  zh: {
    other: "English",
    nav: "页面",
    health: "运行状况",
    home: "试用",
    model: "模型",
    input: "输入",
    sources: "图片来源",
    draw: "手写",
    picture: "图片",
    camera: "摄像头",
    draw_area: "手写区：用鼠标、笔或手指写一个数字",
    draw_hint: "写一个数字，0 到 9",
    undo: "撤销",
    clear: "清除",
    choose: "选择图片",
    drop: "也可以拖到这里，或直接粘贴",
    drop_now: "松开即可识别",
    drop_now_any: "松开即可发送",
    choose_files: "选择文件",
    only_tensors: "此模型读取张量，本页面无法发送。",
    camera_view: "摄像头画面",
    camera_on: "打开摄像头",
    camera_off: "关闭",
    camera_take: "拍照",
    camera_live: "连续识别",
    camera_is_off: "摄像头已关闭。画面只会发送到这台服务器。",
    camera_asks: "正在等待摄像头……",
    camera_insecure:
      "浏览器只允许通过 https 或 localhost 打开的页面使用摄像头。请用 --tls-cert 和 --tls-key 启动服务，或改为选择图片：手机在选择图片时可以直接拍照。",
    camera_absent: "此浏览器不允许网页使用摄像头。请改为选择图片。",
    camera_denied: "此页面被禁止使用摄像头。请在浏览器的网站设置中允许，然后重新打开摄像头。",
    camera_none: "没有找到摄像头。",
    camera_busy: "无法启动摄像头，可能正被其他程序占用。",
    text: "文本",
    fields: "一行的各列；留空表示缺失值。",
    text_ask: "分类",
    text_ask_any: "发送",
    text_hint: "或按 Ctrl + Enter",
    shell: "用命令行完成同样的操作",
    shell_tensors: "用命令行查看张量的名称和形状",
    answers: "结果",
    empty: "这里会显示最可能的类别、所用时间和所用引擎。",
    empty_any: "这里会显示结果、所用时间和所用引擎。",
    forget: "移除全部结果",
    knows: "全部 {n} 个类别",
    more: "以及另外 {n} 个",
    is_image: "图片，{width} × {height}，{colour}",
    is_text: "文本",
    grey: "灰度",
    colour: "彩色",
    classes: "{n} 个类别",
    version: "版本 {version}",
    drawn: "手写",
    photographed: "摄像头",
    pending: "正在识别……",
    took: "服务器用时 {server}，往返 {trip}",
    by: "{engine} {precision}",
    by_model: "{model}，版本 {version}",
    result: "{name}：{answer}",
    result_many: "共 {all} 个，其中 {n} 个有结果",
    result_error: "{name}：没有结果。{error}",
    no_answer: "没有结果",
    nothing: "未找到任何目标",
    threshold: "显示边框的最低得分",
    again: "重试",
    again_in: "{n} 秒后可重试",
    offline: "无法连接服务器。",
    offline_still: "无法连接服务器，正在自动重试。",
    full: "服务器请求过多。为了不拖慢其他请求，已拒绝这次请求。",
    not_ready: "模型尚未就绪。",
    large: "超过了服务器允许的大小。",
    late: "等待结果超时。",
    refused: "服务器拒绝了此输入。",
    broken: "服务器处理此输入时出错。",
    key_wrong: "服务器不接受这个密钥。",
    loading: "模型正在加载。",
    failed: "模型未在运行。",
    draining: "服务器正在关闭：已接受的请求会完成，不再接受新请求。",
    no_models: "服务器上没有模型。",
    key_needed: "这台服务器需要 API 密钥。",
    key_use: "使用此密钥",
    key_kept: "只保存在此标签页中，关闭后即清除。",
    key_checking: "正在验证密钥……",
    health_ready: "就绪",
    health_partly: "部分就绪",
    health_not: "未就绪",
    health_draining: "正在关闭",
    health_none: "没有模型",
    health_lost: "无法连接",
    health_about: "suanli {version}，已运行 {time}。每 2 秒刷新。",
    health_since: "显示的是 {time}前的数据。",
    table: "模型",
    state: "状态",
    engine: "引擎",
    requests: "请求",
    rate: "每秒",
    waiting: "等待",
    p50: "p50",
    p99: "p99",
    turned_away: "拒绝",
    errors: "失败",
    restarts: "重启",
    state_ready: "就绪",
    state_loading: "加载中",
    state_failed: "失败",
    state_draining: "正在关闭",
    seconds: "{n} 秒",
    minutes: "{n} 分 {s} 秒",
    hours: "{n} 小时 {m} 分",
    days: "{n} 天 {h} 小时",
  },
};

let language = storedLanguage() ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

function storedLanguage() {
  try {
    const stored = localStorage.getItem(LANGUAGE);
    return Object.hasOwn(WORDS, stored ?? "") ? stored : null;
  } catch {
    return null; // the browser has no storage: use its own language
  }
}

export function words(key, values = {}) {
  const texts = WORDS[language];
  const text = (values.n === 1 && texts[`${key}_one`]) || texts[key] || key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => {
    const value = values[name];
    if (value === undefined || value === null) return whole;
    return typeof value === "object" ? words(value.key, value) : String(value); // {key: …} is a text too
  });
}

// Sets the text of an element, in the chosen language and after a switch, too.
export function say(element, key, values) {
  element.dataset.t = key;
  if (values) element.dataset.values = JSON.stringify(values);
  else delete element.dataset.values;
  element.textContent = words(key, values);
  return element;
}

export function label(element, key) {
  element.dataset.tLabel = key;
  element.setAttribute("aria-label", words(key));
  return element;
}

function showAll() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-t]")) {
    const { t, values } = element.dataset;
    element.textContent = words(t, values ? JSON.parse(values) : {});
  }
  for (const element of document.querySelectorAll("[data-t-label]")) {
    element.setAttribute("aria-label", words(element.dataset.tLabel));
  }
}

export function startLanguage(button) {
  const show = () => {
    showAll();
    button.textContent = words("other");
    button.lang = language === "zh" ? "en" : "zh-CN";
  };
  button.addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    try {
      localStorage.setItem(LANGUAGE, language);
    } catch {
      // no storage: the choice lasts as long as the page
    }
    show();
  });
  show();
}

const NO_BREAK = "\u00a0"; // between a number and its unit

// Seconds in short: "3.2 ms", "48 ms", "1.24 s".
export function brief(seconds) {
  const ms = 1000 * seconds;
  if (ms < 9.95) return `${ms.toFixed(1)}${NO_BREAK}ms`;
  return ms < 999.5 ? `${ms.toFixed(0)}${NO_BREAK}ms` : `${seconds.toFixed(2)}${NO_BREAK}s`;
}

// A longer time, as values for `say`: "48 s", "3 min 5 s", "2 h 10 min", "4 d 3 h".
export function long(seconds) {
  const s = Math.floor(seconds);
  if (s < 60) return { key: "seconds", n: s };
  if (s < 3600) return { key: "minutes", n: Math.floor(s / 60), s: s % 60 };
  if (s < 86400) return { key: "hours", n: Math.floor(s / 3600), m: Math.floor((s % 3600) / 60) };
  return { key: "days", n: Math.floor(s / 86400), h: Math.floor((s % 86400) / 3600) };
}

export const percent = (share) => `${(100 * share).toFixed(2)}${NO_BREAK}%`;
export const count = (n) => n.toLocaleString("en"); // 1,234 in both languages
