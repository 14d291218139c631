// Asks a running server through OpenAI's official JavaScript client and compares with reference values.
//
//     NODE_PATH=FOLDER/node_modules node judge.cjs http://127.0.0.1:8080
//
// FOLDER is where package.json was installed, outside the tree. Exits 1 with the list of what fails.

const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");
const { OpenAI } = require("openai");

const reference = JSON.parse(fs.readFileSync(path.join(__dirname, "reference.json"), "utf8"));
// The bundled weights are 8-bit; the model's README promises this of them.
const LEAST_COSINE = 0.999;

const url = process.argv[2];
if (!url) {
  console.error("usage: node judge.cjs URL");
  process.exit(2);
}
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const model = reference.model;

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
  async "errors are the classes the client knows"() {
    await assert.rejects(client.embeddings.create({ model: "no/such", input: "x" }), OpenAI.NotFoundError);
    await assert.rejects(client.embeddings.create({ model, input: [] }), OpenAI.BadRequestError);
    await assert.rejects(
      client.embeddings.create({ model, input: "x", dimensions: 100_000 }),
      OpenAI.UnprocessableEntityError,
    );
  },
};

async function main() {
  let numFailed = 0;
  for (const [name, test] of Object.entries(tests)) {
    try {
      await test();
      console.log(`ok    openai (JavaScript): ${name}`);
    } catch (error) {
      numFailed += 1;
      console.log(`FAIL  openai (JavaScript): ${name}\n${error.stack}`);
    }
  }
  process.exit(numFailed ? 1 : 0);
}

main();
