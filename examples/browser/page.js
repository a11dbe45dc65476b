// The page: reads a recording, gives its samples to the worker, and shows the transcript.

const SAMPLING_RATE = 16000; // of Whisper
const element = (id) => document.getElementById(id);
const [file, drop, start, language, transcript, status, progress] = [
  "file",
  "drop",
  "start",
  "language",
  "transcript",
  "status",
  "progress",
].map(element);
// A worker keeps to the page's Content-Security-Policy only where its address is a blob.
const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
const worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });
const state = { isReady: false, isBusy: false, samples: null, about: "" };

function say(text, { failed = false } = {}) {
  status.textContent = text;
  status.classList.toggle("failed", failed);
}

function update() {
  start.disabled = !state.isReady || state.isBusy || !state.samples;
  progress.hidden = state.isReady && !state.isBusy;
  document.documentElement.dataset.state = state.isBusy ? "busy" : state.isReady ? "ready" : "loading";
}

function show(text) {
  transcript.textContent = text || "Nothing is said in this recording.";
  transcript.classList.toggle("empty", !text);
  element("copy").hidden = !text;
}

function offer(codes) {
  const names = new Intl.DisplayNames(["en"], { type: "language" });
  const options = codes.map((code) => new Option(names.of(code), code));
  options.sort((one, other) => one.text.localeCompare(other.text));
  language.replaceChildren(...options);
  const own = navigator.language.split("-")[0];
  language.value = codes.includes(own) ? own : "en";
  element("languages").hidden = codes.length === 0;
}

// Mono at the model's rate.
async function samplesOf(recording) {
  const context = new OfflineAudioContext(1, 1, SAMPLING_RATE);
  const decoded = await context.decodeAudioData(await recording.arrayBuffer());
  const mono = new Float32Array(decoded.length);
  for (let channel = 0; channel < decoded.numberOfChannels; channel++) {
    const values = decoded.getChannelData(channel);
    for (let index = 0; index < mono.length; index++) mono[index] += values[index] / decoded.numberOfChannels;
  }
  return mono;
}

async function choose(recording) {
  if (!recording || state.isBusy) return;
  state.samples = null;
  try {
    state.samples = await samplesOf(recording);
  } catch {
    say(`${recording.name} cannot be read: it must be a recording in a format that this browser plays.`, {
      failed: true,
    });
    return update();
  }
  const player = element("player");
  URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(recording);
  element("name").textContent = recording.name;
  element("duration").textContent = `${(state.samples.length / SAMPLING_RATE).toFixed(1)} s`;
  element("chosen").hidden = false;
  drop.querySelector("strong").textContent = "Choose another recording";
  if (state.isReady) say(state.about);
  update();
}

worker.onmessage = ({ data }) => {
  if (data.type === "loading") {
    progress.value = data.part;
    return;
  }
  if (data.type === "ready") {
    state.isReady = true;
    state.about = `Model: ${(data.bytes / 1e6).toFixed(0)} MB, in ONNX Runtime Web`;
    offer(data.languages);
    say(state.about);
  } else if (data.type === "text") {
    if (!data.isFinal) return void (transcript.textContent = data.text);
    show(data.text);
    state.isBusy = false;
    say(`${data.seconds.toFixed(1)} s for ${data.duration.toFixed(1)} s of audio. ${state.about}`);
  } else {
    state.isBusy = false;
    say(data.message, { failed: true });
    document.documentElement.dataset.failed = data.message;
  }
  update();
};
worker.onerror = (event) => say(`The worker failed: ${event.message}`, { failed: true });

file.addEventListener("change", () => choose(file.files[0]));
for (const type of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(type, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", type === "dragover");
    if (type === "drop") choose(event.dataTransfer.files[0]);
  });
}
start.addEventListener("click", () => {
  state.isBusy = true;
  progress.removeAttribute("value"); // its end is not known
  transcript.classList.remove("empty");
  transcript.textContent = "…";
  element("copy").hidden = true;
  say("Transcribing …");
  worker.postMessage({ samples: state.samples, language: language.value });
  update();
});
element("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(transcript.textContent);
  element("copy").textContent = "Copied";
  setTimeout(() => (element("copy").textContent = "Copy"), 1500);
});
update();
