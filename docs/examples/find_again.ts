// Post inferences, lose the connection, come back and find every result. No packages: the fetch of Node.js 18 or newer.
//
//     npx tsx docs/examples/find_again.ts [http://127.0.0.1:8080]

const url = process.argv[2] ?? "http://127.0.0.1:8080";

/** An inference as the server answers it; `output` is there once it has succeeded. */
interface Inference {
  id: string;
  status: "queued" | "running" | "succeeded" | "failed" | "cancelled";
  model: string;
  user: string | null;
  metadata: Record<string, string>;
  output?: { embeddings: number[][] };
  feedback?: { score?: number; label?: string; comment?: string }[];
}

interface Page {
  data: Inference[];
  next_cursor: string | null;
}

/** RFC 9457: what was wrong, and with which field. */
class Refused extends Error {
  constructor(
    readonly kind: string,
    detail: string,
    readonly field?: string,
  ) {
    super(`${kind}: ${detail}`);
  }
}

async function call<T>(method: string, path: string, body?: unknown, headers: Record<string, string> = {}): Promise<T> {
  const answer = await fetch(url + path, {
    method,
    headers: { "content-type": "application/json", ...headers },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const text = await answer.text();
  const json = text === "" ? undefined : JSON.parse(text);
  if (!answer.ok) throw new Refused(json.kind, json.detail, json.field);
  return json as T;
}

/** The names of an inference's events, until it is final. */
async function* events(path: string): AsyncGenerator<string> {
  const answer = await fetch(url + path);
  if (!answer.body) throw new Error("no stream");
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of answer.body as unknown as AsyncIterable<Uint8Array>) {
    const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) if (line.startsWith("event: ")) yield line.slice("event: ".length);
  }
}

/** All inferences with these conditions, newest first, page by page. */
async function* everything(conditions: Record<string, string>): AsyncGenerator<Inference> {
  let cursor: string | null = null;
  do {
    const query: URLSearchParams = new URLSearchParams({ ...conditions, limit: "2", ...(cursor ? { cursor } : {}) });
    const page: Page = await call<Page>("GET", `/api/v1/inferences?${query}`);
    yield* page.data;
    cursor = page.next_cursor;
  } while (cursor);
}

async function all(conditions: Record<string, string>): Promise<Inference[]> {
  const found: Inference[] = [];
  for await (const inference of everything(conditions)) found.push(inference);
  return found;
}

function check(holds: boolean, what: string): void {
  if (!holds) throw new Error(what);
}

async function main(): Promise<void> {
  // Every user of this run is a new one, so that the example can be run again.
  const user = `u-${crypto.randomUUID().slice(0, 8)}`;

  // 1. Computed, kept, and only then answered. The key makes it safe to send again after a lost connection.
  const headers = { "idempotency-key": crypto.randomUUID() };
  const body = { input: "Where is my parcel?", user, metadata: { ticket: "4711" } };
  const first = await call<Inference>("POST", "/api/v1/inferences", body, headers);
  const again = await call<Inference>("POST", "/api/v1/inferences", body, headers);
  check(first.id === again.id, "computed twice");
  console.log("kept as", first.id, "with", first.output?.embeddings[0].length, "values");

  // 2. Not waited for: accepted at once, computed when there is room, and followed by events.
  const later = await call<Inference>("POST", "/api/v1/inferences", { input: ["one", "two"], mode: "async", user });
  for await (const name of events(`/api/v1/inferences/${later.id}/events`)) console.log("event:", name);
  const result = await call<Inference>("GET", `/api/v1/inferences/${later.id}`);
  check(result.status === "succeeded" && result.output?.embeddings.length === 2, "not computed");

  // 3. Found again: by user, and by what was attached.
  await call("POST", "/api/v1/inferences", { input: "And where is the other one?", user });
  check((await all({ user })).length === 3, "not all are found");
  const found = await all({ user, "metadata.ticket": "4711" });
  check(found.length === 1 && found[0].id === first.id, "not found by its metadata");

  // 4. What people think of a result belongs to it.
  await call("POST", `/api/v1/inferences/${first.id}/feedback`, { score: 1, label: "relevant" });
  const judged = await call<Inference>("GET", `/api/v1/inferences/${first.id}`);
  check(judged.feedback?.[0]?.label === "relevant", "the feedback is not there");

  // 5. A refusal names the field and the limit.
  const tooMany = { input: "x", parameters: { dimensions: 100000 } };
  const refusal: unknown = await call("POST", "/api/v1/inferences", tooMany).catch((error: unknown) => error);
  if (!(refusal instanceof Refused) || refusal.field !== "dimensions") throw new Error("it was not refused");
  console.log("refused:", refusal.message);

  // 6. Forgotten: from the store, the journal and the cache.
  const erased = await call<{ deleted: number }>("DELETE", `/api/v1/users/${user}/inferences`);
  check(erased.deleted === 3 && (await all({ user })).length === 0, "not erased");
  console.log("erased", erased.deleted);
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
