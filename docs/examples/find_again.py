#!/usr/bin/env python3
"""Post inferences, lose the connection, come back and find every result. Standard library only.

    python docs/examples/find_again.py [http://127.0.0.1:8080]
"""

import json
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"


def call(method, path, body=None, **headers):
    """Returns the answer's JSON; raises the server's own words where it refuses."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(URL + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        problem = json.load(error)  # RFC 9457: kind, detail, and the field at fault
        raise RuntimeError(f"{problem['kind']}: {problem['detail']}") from None


def events(path):
    """The events of an inference until it is final: (name, data)."""
    with urllib.request.urlopen(URL + path, timeout=60) as stream:
        name = None
        for line in stream:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)


def everything(**conditions):
    """All inferences with these conditions, newest first, page by page."""
    cursor = {}
    while True:
        page = call("GET", "/api/v1/inferences?" + urllib.parse.urlencode(conditions | {"limit": 2} | cursor))
        yield from page["data"]
        if page["next_cursor"] is None:
            return
        cursor = {"cursor": page["next_cursor"]}


# Every user of this run is a new one, so that the example can be run again.
user = f"u-{uuid.uuid4().hex[:8]}"

# 1. Computed, kept, and only then answered. The key makes it safe to send again after a lost connection: the server
#    computes once, and answers the second time with what it has kept.
key = str(uuid.uuid4())
body = {"input": "Where is my parcel?", "user": user, "metadata": {"ticket": "4711"}}
first = call("POST", "/api/v1/inferences", body, idempotency_key=key)
again = call("POST", "/api/v1/inferences", body, idempotency_key=key)
assert first["id"] == again["id"] and first["output"] == again["output"]
print("kept as", first["id"], "with", len(first["output"]["embeddings"][0]), "values")

# 2. Not waited for: accepted at once, computed when there is room, and followed by events.
later = call("POST", "/api/v1/inferences", {"input": ["one", "two"], "mode": "async", "user": user})
for name, data in events(f"/api/v1/inferences/{later['id']}/events"):
    print("event:", name)
result = call("GET", f"/api/v1/inferences/{later['id']}")
assert result["status"] == "succeeded" and len(result["output"]["embeddings"]) == 2

# 3. Found again: by id, by user, by what was attached.
call("POST", "/api/v1/inferences", {"input": "And where is the other one?", "user": user})
assert len(list(everything(user=user))) == 3
found = list(everything(user=user, **{"metadata.ticket": "4711"}))
assert [inference["id"] for inference in found] == [first["id"]]

# 4. What people think of a result belongs to it.
call("POST", f"/api/v1/inferences/{first['id']}/feedback", {"score": 1.0, "label": "relevant"})
assert call("GET", f"/api/v1/inferences/{first['id']}")["feedback"][0]["label"] == "relevant"

# 5. A refusal names the field and the limit.
try:
    call("POST", "/api/v1/inferences", {"input": "x", "parameters": {"dimensions": 100000}})
    raise AssertionError("it was not refused")
except RuntimeError as refusal:
    print("refused:", refusal)

# 6. Forgotten: from the store, the journal and the cache.
erased = call("DELETE", f"/api/v1/users/{user}/inferences")
assert erased["deleted"] == 3 and list(everything(user=user)) == []
print("erased", erased["deleted"])
