// Transcribes clips with transformers.js in Node, from local files alone, and prints a line of JSON.
//
//     node transcribe.mjs LIBRARY MODELS NAME LANGUAGE CLIP...
//
// LIBRARY is the path of the library's file, MODELS the folder that holds the exported folder NAME, and a CLIP is a file
// of samples at 16 kHz in float32.

import fs from "node:fs";
import { pathToFileURL } from "node:url";

const [library, models, name, language, ...clips] = process.argv.slice(2);
const { pipeline, env } = await import(pathToFileURL(library));
env.allowRemoteModels = false;
env.localModelPath = models;
const recognizer = await pipeline("automatic-speech-recognition", name, {
  session_options: { intraOpNumThreads: 2 },
});
const texts = [];
for (const clip of clips) {
  const bytes = fs.readFileSync(clip);
  const samples = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
  const { text } = await recognizer(samples, { language, task: "transcribe" });
  texts.push(text.trim());
}
console.log(JSON.stringify({ texts, version: env.version }));
