// Features of the official clients for Node with the embedded model: node node_features.mjs URL
// Formats, reasoning, sampling, log-probabilities, and streams that are broken off.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamObject, streamText } from "ai";
import { z } from "zod";

const url = process.argv[2];
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "x", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "x", maxRetries: 0 });
const ai = createOpenAICompatible({
  name: "ds4", baseURL: `${url}/v1`, apiKey: "x", includeUsage: true, supportsStructuredOutputs: true,
})("m");
const question = "What is 17 + 25?";
const messages = [{ role: "user", content: question }];
const story = [{ role: "user", content: "Tell me a short story about a fox." }];
const Fox = z.object({ colour: z.enum(["red", "grey"]), legs: z.number().int().min(3).max(4) });

/** Until nobody is answered any more: who left was noticed. */
async function idle() {
  for (;;) {
    const status = await (await fetch(`${url}/status`)).json();
    if (status.active === 0 && status.waiting === 0) return status;
  }
}

// Formats.
const off = { reasoning_effort: "none" };
const parsed = await openai.chat.completions.parse({
  model: "m", messages: story, response_format: zodResponseFormat(Fox, "fox"), max_tokens: 200, ...off,
});
Fox.parse(parsed.choices[0].message.parsed);
Fox.parse((await generateObject({ model: ai, schema: Fox, messages: story })).object);
const objects = streamObject({ model: ai, schema: Fox, messages: story });
for await (const part of objects.partialObjectStream) assert.ok(part);
Fox.parse(await objects.object);
const formatted = await anthropic.messages.create({
  model: "m", max_tokens: 200, messages: story,
  output_config: { format: { type: "json_schema", schema: z.toJSONSchema(Fox) } },
});
Fox.parse(JSON.parse(formatted.content[0].text));

// Reasoning, where each client has it, and none where it is switched off.
const reasons = { model: ai, prompt: question, temperature: 0 };
const thought = await generateText(reasons);
assert.ok(thought.reasoningText.includes("17") && thought.text === "17 + 25 = 42.");
assert.ok(thought.usage.outputTokens > 12 && thought.usage.inputTokens === 14);
let reasoning = "", text = "";
for await (const part of streamText(reasons).fullStream) {
  if (part.type === "reasoning-delta") reasoning += part.text;
  if (part.type === "text-delta") text += part.text;
}
assert.deepEqual([reasoning, text], [thought.reasoningText, thought.text]);
const quiet = await generateText({
  ...reasons, providerOptions: { ds4: { reasoningEffort: "none" } },
});
assert.ok(!quiet.reasoningText && quiet.text === "17 + 25 = 42.");
const whole = await openai.chat.completions.create({
  model: "m", messages, temperature: 0, logprobs: true, top_logprobs: 2, ...off,
});
const { tokens, content } = { tokens: whole.choices[0].logprobs.content, content: whole.choices[0].message.content };
assert.equal(tokens.map((chance) => chance.token).join(""), content);
assert.ok(tokens.every((chance) => chance.top_logprobs.length === 2));
const answered = await openai.responses.create({ model: "m", input: question, temperature: 0 });
assert.deepEqual(answered.output.map((item) => item.type), ["reasoning", "message"]);
const again = await openai.responses.create({
  model: "m", input: "Tell me a short story.", previous_response_id: answered.id, max_output_tokens: 5,
});
assert.equal(again.status, "incomplete");
assert.equal((await openai.responses.retrieve(answered.id)).output_text, answered.output_text);
await openai.responses.delete(answered.id);
await assert.rejects(openai.responses.retrieve(answered.id), OpenAI.NotFoundError);

// Streams that are broken off free the model.
const long = { model: "m", messages: story, max_tokens: 8000 };
const aborts = [
  await openai.chat.completions.create({ ...long, ignore_eos: true, stream: true }),
  await openai.responses.create({ model: "m", input: "Tell me a story.", stream: true }),
];
for (const stream of aborts) {
  for await (const _ of stream) break; // leaving the loop closes the connection
}
const events = anthropic.messages.stream(long);
events.on("text", () => events.abort());
await assert.rejects(events.finalMessage(), Anthropic.APIUserAbortError);
const stop = new AbortController();
const broken = streamText({ model: ai, messages: story, abortSignal: stop.signal, onError() {} });
for await (const part of broken.fullStream) {
  if (part.type === "text-delta" || part.type === "reasoning-delta") stop.abort();
}
const late = new AbortController();
setImmediate(() => late.abort());
await assert.rejects(
  openai.chat.completions.create({ ...long, ignore_eos: true }, { signal: late.signal }),
  OpenAI.APIUserAbortError,
);
await idle();
console.log("ok");
