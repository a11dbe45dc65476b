// Loads the model from this server and transcribes, beside the page so that it stays responsive.

import { pipeline, TextStreamer, env } from "./node_modules/@huggingface/transformers/dist/transformers.min.js";

const MODEL = "model"; // the folder that `hrt export` wrote, beside this file
const SAMPLING_RATE = 16000;
const here = new URL("./", import.meta.url);

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./";
env.fetch = (address, options) => fetch(new URL(address, here), options);
env.useBrowserCache = false;
env.useWasmCache = false;
const runtime = new URL("node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded", here).href;
env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };

async function load() {
  const settings = await (await fetch(new URL(`${MODEL}/generation_config.json`, here))).json();
  const bytes = {};
  const recognizer = await pipeline("automatic-speech-recognition", MODEL, {
    device: "wasm",
    progress_callback: ({ file, loaded, total }) => {
      if (!file?.endsWith(".onnx") || !total) return;
      bytes[file] = [loaded, total];
      const [done, all] = Object.values(bytes).reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
      postMessage({ type: "loading", part: done / all });
    },
  });
  const codes = Object.keys(settings.lang_to_id ?? {}).map((token) => token.slice(2, -2));
  const size = Object.values(bytes).reduce((sum, [, total]) => sum + total, 0);
  postMessage({ type: "ready", languages: codes, bytes: size });
  return recognizer;
}

const loading = load().catch((error) => {
  postMessage({ type: "error", message: `The model cannot be loaded: ${error.message}` });
  return null;
});

onmessage = async ({ data: { samples, language } }) => {
  const recognizer = await loading;
  const start = performance.now();
  let heard = "";
  const say = (piece) => postMessage({ type: "text", text: (heard += piece), isFinal: false });
  const options = language ? { language, task: "transcribe" } : {};
  try {
    if (samples.length > 30 * SAMPLING_RATE) {
      Object.assign(options, { chunk_length_s: 30, stride_length_s: 5 });
    } else {
      const { tokenizer } = recognizer;
      options.streamer = new TextStreamer(tokenizer, { skip_prompt: true, callback_function: say });
    }
    const { text } = await recognizer(samples, options);
    postMessage({
      type: "text",
      text: text.trim(),
      isFinal: true,
      seconds: (performance.now() - start) / 1000,
      duration: samples.length / SAMPLING_RATE,
    });
  } catch (error) {
    postMessage({ type: "error", message: `The recording cannot be transcribed: ${error.message}` });
  }
};
