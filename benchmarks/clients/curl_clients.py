"""curl, with the offers and the habits that it has: one line of JSON for each step."""

import gzip
import json
import os
import subprocess

URL, KEY, MODEL = os.environ["CLIENT_URL"], os.environ["CLIENT_KEY"], os.environ["CLIENT_MODEL"]
BODY = json.dumps(
    {
        "model": MODEL,
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
).encode()
STREAMED = BODY[:-1] + b', "stream": true}'


def step(name: str, body: bytes, *flags: str) -> None:
    command = [
        "curl", "-s", "-S", "-w", "\n%{http_code} %{http_version}", "-H", "content-type: application/json",
        "-H", f"authorization: Bearer {KEY}", "--data-binary", "@-", *flags, f"{URL}/chat/completions",
    ]  # fmt: skip
    done = subprocess.run(command, input=body, capture_output=True, check=False)
    text, _, end = done.stdout.decode().rpartition("\n")
    ok = end.startswith("200 ") and ("data: [DONE]" if b"stream" in body else '"choices"') in text
    detail = (
        f"{end.strip()}, {len(text)} characters" if ok else f"{end} {text[:200]} {done.stderr.decode()[:200]}"
    )
    print(json.dumps({"client": "curl", "step": name, "ok": ok, "detail": detail}), flush=True)


if __name__ == "__main__":
    step("HTTP/1.1", BODY)
    step("--http2", BODY, "--http2")
    step("--http2 stream", STREAMED, "--http2")
    step("--http1.0", BODY, "--http1.0")
    step("--http1.0 stream", STREAMED, "--http1.0")
    step("chunked upload", BODY, "-H", "transfer-encoding: chunked")
    step("Expect", BODY, "-H", "expect: 100-continue")
    step("gzip", gzip.compress(BODY), "-H", "content-encoding: gzip")
