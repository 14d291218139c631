// Asks a running server through OpenAI's official JavaScript client and compares with reference values.
//
//     NODE_PATH=FOLDER/node_modules node judge.js http://127.0.0.1:8080
//
// FOLDER is where package.json was installed, outside the tree. Exits 1 with the list of what fails.

const assert = require("node:assert/strict");
const { spawn } = require("node:child_process");
const fs = require("node:fs");
const net = require("node:net");
const os = require("node:os");
const path = require("node:path");
const { parseArgs } = require("node:util");
const { OpenAI } = require("openai");

const reference = JSON.parse(fs.readFileSync(path.join(__dirname, "reference.json"), "utf8"));
// The bundled weights are 8-bit; the model's README promises this of them.
const LEAST_COSINE = 0.999;

let client;
const model = reference.model;
// Method and path of each request since it was last emptied.
let requests = new Set();

function recordingFetch(url, options = {}) {
  const { protocol, pathname } = new URL(url instanceof Request ? url.url : url);
  // The client also asks for `data:,`, to see what fetch can.
  if (protocol === "http:") requests.add(`${(options.method ?? "GET").toUpperCase()} ${pathname}`);
  return fetch(url, options);
}

function unpack(text) {
  const bytes = Buffer.from(text, "base64");
  return Array.from({ length: bytes.length / 4 }, (_, i) => bytes.readFloatLE(4 * i));
}

function same(row, expected) {
  assert.equal(row.length, expected.length);
  const product = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const cosine = product(row, expected) / Math.sqrt(product(row, row) * product(expected, expected));
  assert.ok(cosine >= LEAST_COSINE, `cosine ${cosine} below ${LEAST_COSINE}`);
}

const tests = {
  async "embeds as the client asks by itself"() {
    const answer = await client.embeddings.create({ model, input: reference.texts });
    assert.equal(answer.data.length, reference.texts.length);
    answer.data.forEach((item, i) => same(Array.from(item.embedding), unpack(reference.embeddings[i])));
    assert.equal(answer.usage.prompt_tokens, reference.num_tokens.reduce((a, b) => a + b));
  },
  async "floats, token ids, dimensions"() {
    const floats = await client.embeddings.create({ model, input: reference.token_ids, encoding_format: "float" });
    same(floats.data[0].embedding, unpack(reference.token_ids_embedding));
    const cut = await client.embeddings.create({ model, input: reference.texts[0], dimensions: 64 });
    same(Array.from(cut.data[0].embedding), unpack(reference.embeddings[0]).slice(0, 64));
  },
  async "models"() {
    const ids = [];
    for await (const listed of client.models.list()) ids.push(listed.id);
    assert.ok(ids.includes(model));
    assert.equal((await client.models.retrieve(model)).id, model);
  },
  async "files and batches"() {
    const request = { method: "POST", url: "/v1/embeddings" };
    const lines = reference.texts.map((input, i) => ({ ...request, custom_id: `js-${i}`, body: { model, input } }));
    const text = lines.map((line) => `${JSON.stringify(line)}\n`).join("");
    const file = await client.files.create({ file: new File([text], "js.jsonl"), purpose: "batch" });
    assert.equal(file.bytes, Buffer.byteLength(text));
    assert.equal(await (await client.files.content(file.id)).text(), text);
    let batch = await client.batches.create({
      input_file_id: file.id,
      endpoint: "/v1/embeddings",
      completion_window: "24h",
      metadata: { judge: "JavaScript" },
    });
    const end = Date.now() + 60_000;
    while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
      assert.ok(Date.now() < end, batch.status);
      await new Promise((resolve) => setTimeout(resolve, 50));
      batch = await client.batches.retrieve(batch.id);
    }
    assert.equal(batch.status, "completed");
    assert.deepEqual(batch.request_counts, { total: lines.length, completed: lines.length, failed: 0 });
    assert.equal(batch.error_file_id, null);
    const answers = (await (await client.files.content(batch.output_file_id)).text()).trim().split("\n").map(JSON.parse);
    assert.deepEqual(answers.map((answer) => answer.custom_id), lines.map((line) => line.custom_id));
    answers.forEach((answer, i) => same(answer.response.body.data[0].embedding, unpack(reference.embeddings[i])));
    const listed = [];
    for await (const one of client.batches.list({ limit: 1 })) listed.push(one.id);
    assert.ok(listed.includes(batch.id));
    const files = [];
    for await (const one of client.files.list({ limit: 1 })) files.push(one.id);
    assert.ok(files.includes(file.id) && files.includes(batch.output_file_id));
    assert.equal((await client.files.delete(file.id)).deleted, true);
    await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);
    await assert.rejects(client.batches.cancel(batch.id), OpenAI.ConflictError);
  },
  async "errors are the classes the client knows"() {
    await assert.rejects(client.embeddings.create({ model: "no/such", input: "x" }), OpenAI.NotFoundError);
    await assert.rejects(client.embeddings.create({ model, input: [] }), OpenAI.BadRequestError);
    await assert.rejects(
      client.embeddings.create({ model, input: "x", dimensions: 100_000 }),
      OpenAI.UnprocessableEntityError,
    );
  },
};

async function judge(url, record) {
  const options = { apiKey: "none", maxRetries: 0, timeout: 60_000, fetch: recordingFetch };
  client = new OpenAI({ baseURL: `${url}/v1`, ...options });
  const checks = [];
  for (const [name, test] of Object.entries(tests)) {
    requests = new Set();
    let passed = true;
    try {
      await test();
      console.log(`ok    openai (JavaScript): ${name}`);
    } catch (error) {
      passed = false;
      console.log(`FAIL  openai (JavaScript): ${name}\n${error.stack}`);
    }
    const version = require("openai/version").VERSION;
    checks.push({ client: "openai (JavaScript)", version, check: name, passed, requests: [...requests].sort() });
  }
  if (record) {
    const { paths } = await (await fetch(`${url}/openapi.json`)).json();
    const routes = Object.entries(paths).flatMap(([path, item]) =>
      Object.entries(item).map(([method, { tags }]) => ({ route: `${method.toUpperCase()} ${path}`, of: tags[0] })),
    );
    fs.writeFileSync(record, `${JSON.stringify({ routes, checks }, null, 1)}\n`);
  }
  return checks.filter((check) => !check.passed).length;
}

function freePort() {
  return new Promise((resolve, reject) => {
    const probe = net.createServer().once("error", reject);
    probe.listen(0, "127.0.0.1", () => {
      const { port } = probe.address();
      probe.close(() => resolve(port));
    });
  });
}

async function waitUntilReady(url, server, seconds) {
  const end = Date.now() + seconds * 1000;
  while (Date.now() < end) {
    if (server.exitCode !== null) throw new Error(`the server ended with ${server.exitCode} before it was ready`);
    const answer = await fetch(`${url}/health/ready`).catch(() => null);
    if (answer && answer.ok) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`the server was not ready within ${seconds} s`);
}

async function judgeBinary(binary, record) {
  const port = await freePort();
  const data = fs.mkdtempSync(path.join(os.tmpdir(), "eremois-judge-"));
  const env = { EREMOIS_LOG__FILTER: "warn", ...process.env, EREMOIS_API__LISTEN: `127.0.0.1:${port}`, EREMOIS_DATABASE__PATH: data };
  const server = spawn(binary, ["serve"], { env, stdio: "inherit" });
  const ended = new Promise((resolve) => server.once("exit", resolve));
  try {
    await waitUntilReady(`http://127.0.0.1:${port}`, server, 120);
    return await judge(`http://127.0.0.1:${port}`, record);
  } finally {
    server.kill("SIGTERM");
    await ended;
    fs.rmSync(data, { recursive: true, force: true });
  }
}

async function main() {
  const { values, positionals } = parseArgs({ options: { record: { type: "string" } }, allowPositionals: true });
  const [url] = positionals;
  const binary = process.env.EREMOIS_TEST_BIN ?? "target/debug/eremois";
  const numFailed = await (url ? judge(url, values.record) : judgeBinary(binary, values.record));
  process.exit(numFailed ? 1 : 0);
}

main();
