// The official clients for Node against a scripted server: node node_clients.mjs URL
// Every answer of the script calls `look` first, then says "The word is XYZZY.".
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const url = process.argv[2];
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "x", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "x", maxRetries: 0 });
const schema = { type: "object", properties: { where: { type: "string" } }, required: ["where"] };
const messages = [{ role: "user", content: "Which word?" }];

// openai: tools run by the package, streamed chat, responses.
const run = openai.chat.completions.runTools({
  model: "m", messages, stream: false,
  tools: [{ type: "function", function: {
    name: "look", parameters: schema, function: ({ where }) => `found in ${where}`, parse: JSON.parse,
  } }],
});
assert.equal(await run.finalContent(), "The word is XYZZY.");
const tools = [{ type: "function", function: { name: "look", parameters: schema } }];
const chat = openai.chat.completions.stream({
  model: "m", messages, tools, stream_options: { include_usage: true },
});
const called = (await chat.finalChatCompletion()).choices[0];
assert.equal(called.finish_reason, "tool_calls");
assert.deepEqual(JSON.parse(called.message.tool_calls[0].function.arguments), { where: "a &lt; b" });
assert.ok((await chat.totalUsage()).prompt_tokens > 0);
await openai.chat.completions.create({ model: "m", messages });
const response = openai.responses.stream({
  model: "m", input: "Which word?", tools: [{ type: "function", name: "look", parameters: schema }],
});
const made = (await response.finalResponse()).output;
assert.deepEqual(made.map((item) => item.type), ["reasoning", "function_call"]);
const second = await openai.responses.create({
  model: "m",
  input: [
    { role: "user", content: "Which word?" }, ...made,
    { type: "function_call_output", call_id: made[1].call_id, output: "found" },
  ],
});
assert.equal(second.output_text, "The word is XYZZY.");

// @anthropic-ai/sdk: a streamed call, its result, an answer with reasoning.
const ask = {
  model: "m", max_tokens: 2000, thinking: { type: "enabled", budget_tokens: 1024 },
  tools: [{ name: "look", input_schema: schema }],
};
const stream = anthropic.messages.stream({ ...ask, messages });
const first = await stream.finalMessage();
assert.equal(first.stop_reason, "tool_use");
assert.deepEqual(first.content.map((block) => block.type), ["thinking", "tool_use"]);
assert.deepEqual(first.content[1].input, { where: "a &lt; b" });
const after = await anthropic.messages.create({
  ...ask,
  messages: [
    ...messages, { role: "assistant", content: first.content },
    { role: "user", content: [
      { type: "tool_result", tool_use_id: first.content[1].id, content: "found" },
    ] },
  ],
});
assert.equal(after.content.at(-1).text, "The word is XYZZY.");

// ai with @ai-sdk/openai-compatible: the package's own loop, whole and streamed.
const model = createOpenAICompatible({ name: "ds4", baseURL: `${url}/v1`, apiKey: "x",
  includeUsage: true })("m");
const look = tool({
  description: "Looks.", inputSchema: z.object({ where: z.string() }),
  execute: async ({ where }) => `found in ${where}`,
});
const loop = { model, prompt: "Which word?", tools: { look }, stopWhen: stepCountIs(3) };
const done = await generateText(loop);
assert.equal(done.text, "The word is XYZZY.");
assert.equal(done.steps[0].toolResults[0].output, "found in a &lt; b");
const streamed = streamText(loop);
let text = "";
for await (const piece of streamed.textStream) text += piece;
assert.equal(text, "The word is XYZZY.");
assert.equal(await streamed.finishReason, "stop");
console.log("ok");
