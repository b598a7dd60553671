"""How servers answer: one entry a dialect, with what a load test must make of it.

`SHARED` are the answers of the server that users' reports were first tried against; `OWN` are others,
            of servers that
issues tell of and of what proxies make of an answer. Nothing here runs anything; `odd_server.py` plays it.
"""

import gzip
import json
import zlib
from typing import Any

from tests.loadtest.dialects.wire import (
    ANSWER,
    BROKEN,
    CUT_OFF,
    DONE,
    FAILED,
    NO_USAGE,
    NORMAL,
    NOT_STREAMED_ANSWER,
    NOTHING,
    OVERLOADED,
    PROMPT,
    REJECTED,
    ROLE,
    STOP,
    THOUGHT,
    TYPE,
    USAGE,
    USED,
    WORDS,
    Dialect,
    N,
    _finish_empty,
    chunk,
    each,
    framed,
    http,
    lines,
    plain,
    typed,
    usage_event,
    whole,
    with_usage,
)

from lowbit_loadtest.generate.answer import HIDDEN_REASONING, MORE_TOKENS_THAN_BYTES

SHARED = (
    Dialect("ok", plain(NORMAL)),
    Dialect("nousage", plain([ROLE, *WORDS, STOP, DONE]), **NO_USAGE),
    Dialect("usagenull", plain([*({**one, "usage": None} for one in [ROLE, *WORDS, STOP]), DONE]), **NO_USAGE),
    Dialect("usagepartial", with_usage(completion_tokens=N), tokens=(None, N)),
    Dialect("usagenullcount", with_usage(prompt_tokens=7, completion_tokens=None, total_tokens=7), tokens=(7,
            None), sent=None),
    Dialect("usagestr", with_usage(prompt_tokens="7", completion_tokens="5")),
    Dialect("onlyusagetotal", with_usage(total_tokens=12), **NO_USAGE),
    Dialect("errornull", each(lambda event: {**event, "error": None})),
    Dialect("nodone", plain(NORMAL[:-1]), CUT_OFF, detail="the stream ended without [DONE]; --lenient"),
    Dialect("nofinish", plain([ROLE, *WORDS, USED, DONE]), CUT_OFF, detail="[DONE] without finish_reason"),
    Dialect("finishempty", each(_finish_empty)),
    Dialect(
        "reasoning",
        plain([ROLE, *[chunk({"reasoning_content": "r"})] * 3, *WORDS, STOP, usage_event(
            completion_tokens=N + 3, completion_tokens_details={"reasoning_tokens": 3}), DONE]),
        tokens=(PROMPT, N + 3), chunks=N + 3, sent=N + 3, answer_at=3,
    ),
    Dialect("listcontent", plain([ROLE, *[chunk({"content": [{"type": "text", "text": "a "}]})] * N, STOP,
            USED, DONE])),
    Dialect("multi", plain([ROLE, chunk({"content": "a b c"}), chunk({"content": "d e"}), STOP, USED, DONE]),
            chunks=2),
    Dialect("azure", plain([{"id": "", "choices": [], "prompt_filter_results": []}, *NORMAL])),
    Dialect("completions", plain([*[{"choices": [{"text": "a", "index": 0, "finish_reason": None}]}] * N,
                                  {"choices": [{"text": "", "finish_reason": "length"}], "usage": USAGE},
            DONE])),
    Dialect("errorevent", plain([ROLE, WORDS[0], {"error": {"message": "engine died", "code": 500}}, DONE]),
            **BROKEN, chunks=1, detail="error event: engine died"),
    Dialect("errorobject", plain([ROLE, WORDS[0], {"object": "error", "message": "engine died", "code": 500},
            DONE]),
            **BROKEN, chunks=1, detail="error event: engine died"),
    Dialect("nullchoice", plain([ROLE, *WORDS, {"choices": [None]}, STOP, USED, DONE]), **BROKEN,
            detail='not of /v1/chat/completions: {"choices": [null]}'),
    Dialect("prefixdone", plain([*NORMAL[:-1], "[DONE] "])),
    Dialect("err200", whole({"error": OVERLOADED}), FAILED, **NOTHING,
            detail="status 200 with an error: model overloaded"),
    Dialect("nonstream", whole(ANSWER), **NOT_STREAMED_ANSWER),
    Dialect("redirectchat", http(b"", 307, headers="location: /ok/v1/chat/completions\r\n", chunked=False),
            FAILED,
            **NOTHING, detail="status 307: redirects to http://127.0.0.1"),
    Dialect("http500", http(b"<html>bad gateway</html>", 500, "text/html", chunked=False), FAILED, **NOTHING,
            detail="status 500: <html>bad gateway</html>"),
    Dialect("empty200", http(b"", chunked=False), CUT_OFF, **NOTHING, detail="an empty answer (status 200)"),
    Dialect("gzip", http(gzip.compress(lines(NORMAL), mtime=0), headers="content-encoding: gzip\r\n")),
    Dialect("untilclose", b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + lines(NORMAL),
            closes=True),
    Dialect("uppercase", framed(4096)),
    Dialect("crlf", http(lines(NORMAL, end="\r\n\r\n"))),
    Dialect("cr", http(lines(NORMAL, end="\r\r"))),
    Dialect("nospace", http(lines(NORMAL, "data:"))),
    Dialect("ids", http(lines(NORMAL, "id: 1\nevent: message\ndata: "))),
    Dialect("comments", http(lines(NORMAL, ": keep-alive\n\ndata: "))),
    Dialect("hiddenreasoning", plain([ROLE, *WORDS, STOP, usage_event(completion_tokens=105, **THOUGHT), DONE]),
            tokens=(PROMPT, 105), notes=(HIDDEN_REASONING,)),
    Dialect("usageeach", plain([*({**one, "usage": {"prompt_tokens": 7, "completion_tokens": i}}
                                  for i, one in enumerate([ROLE, *WORDS])), STOP, USED, DONE])),
    Dialect("usagechoice", plain([ROLE, *WORDS, {**STOP, "choices": [{**STOP["choices"][0], "usage": USAGE}]},
            DONE])),
    Dialect("toolcalls", plain([ROLE, *[chunk({"tool_calls": [{"index": 0,
            "function": {"arguments": "x"}}]})] * N,
                                chunk({}, "tool_calls"), USED, DONE])),
    Dialect("filter", plain([ROLE, *WORDS, chunk({}, "content_filter"), USED, DONE])),
)  # fmt: skip

PRETTY = "\n".join(f"data: {line}" for line in json.dumps(WORDS[0], indent=1).splitlines()) + "\n\n"
TWO = [
    {**chunk(), "choices": [{"index": i % 2, "delta": {"content": "w "}, "finish_reason": None}]}
    for i in range(6)
]
CALL = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
GROQ = [ROLE, *WORDS, {**STOP, "x_groq": {"id": "r", "usage": USAGE}}, DONE]
NAMES = {"input_tokens": PROMPT, "output_tokens": N}
GEMINI = {"prompt_tokens": PROMPT, "completion_tokens": N, "total_tokens": PROMPT + N + 80,
          "completion_tokens_details": {"reasoning_tokens": 80}}  # fmt: skip
GROK = {
    "prompt_tokens": PROMPT,
    "completion_tokens": N,
    "completion_tokens_details": {"reasoning_tokens": 90},
}
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hm "}]}
SAID = [{"type": "response.output_text.delta", "delta": f"w{i} "} for i in range(N)]
RESPONSE = {
    "object": "response",
    "status": "completed",
    "error": None,
    "usage": {**NAMES, "total_tokens": PROMPT + N},
}
CREATED = {"type": "response.created", "response": {**RESPONSE, "status": "in_progress", "usage": None}}
ENDED = {"type": "response.completed", "response": RESPONSE}
BEGUN = {"type": "message_start", "message": {"type": "message", "content": [], "usage": {
    "input_tokens": 3, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 0,
            "output_tokens": 1}}}  # fmt: skip
BLOCK = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
DELTAS = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "w "}}] * N
STOPPED = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": N}}
LAST = {"type": "message_stop"}
CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES = (
    "chat",
    "completions",
    "embeddings",
    "responses",
    "messages",
)


def at(endpoint: str, **expected: Any) -> dict[str, Any]:
    return {"endpoint": endpoint, **expected}


def tagged(*texts: str) -> bytes:
    """An answer in these pieces."""
    return plain([ROLE, *(chunk({"content": text}) for text in texts), STOP, USED, DONE])


OWN = (
    Dialect("bom", http(b"\xef\xbb\xbf" + lines(NORMAL))),
    Dialect("one newline between events", http(lines(NORMAL, end="\n"))),
    Dialect("data over several lines", http(lines([ROLE]) + PRETTY.encode() + lines([*WORDS[1:], STOP, USED,
            DONE]))),
    Dialect("no newline at the end", http(lines(NORMAL)[:-2])),
    Dialect("one byte at a time", framed(1)),
    Dialect("crlf, seven bytes at a time", framed(7, lines(NORMAL, end="\r\n\r\n"))),
    Dialect("cr, five bytes at a time", framed(5, lines(NORMAL, end="\r\r"))),
    Dialect("empty events", http(b"data:\n\nretry: 5\n\n" + lines(NORMAL, "data: \n\ndata: "))),
    Dialect("events called json", http(lines(NORMAL), kind="application/json")),
    Dialect("json called events", whole(ANSWER, kind=TYPE), **NOT_STREAMED_ANSWER),
    Dialect("events of a known length", http(lines(NORMAL), chunked=False)),
    Dialect("close after each", http(lines(NORMAL), headers="connection: close\r\n"), closes=True),
    Dialect("http 1.0 with a length", http(lines(NORMAL), chunked=False).replace(b"1.1", b"1.0", 1),
            closes=True),
    Dialect("early hints", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + plain(NORMAL)),
    Dialect("deflate", http(zlib.compress(lines(NORMAL)),
            headers="content-encoding: deflate\r\n")),
    Dialect("counts as 5.0", with_usage(prompt_tokens=7.0, completion_tokens=5.0)),
    Dialect("counts that are none", with_usage(prompt_tokens=-1, completion_tokens=True, total_tokens="many"),
            **NO_USAGE),
    Dialect("usage that is a list", plain([ROLE, *WORDS, STOP, {**USED, "usage": [7, 5]}, DONE]), **NO_USAGE),
    Dialect("total without output", with_usage(prompt_tokens=PROMPT, total_tokens=PROMPT + N)),
    Dialect("total without prompt", with_usage(completion_tokens=N, total_tokens=PROMPT + N)),
    Dialect("usage by the other names", with_usage(**NAMES)),
    Dialect("x_groq", plain(GROQ)),
    Dialect("usage, then null", plain([ROLE, *WORDS, STOP, USED, {**USED, "usage": None}, DONE])),
    Dialect("usage, then empty", plain([ROLE, *WORDS, STOP, USED, {**USED, "usage": {}}, DONE])),
    Dialect("reasoning apart, by the total", with_usage(**GEMINI), notes=(HIDDEN_REASONING,)),
    Dialect("reasoning apart, more than output", with_usage(**GROK), notes=(HIDDEN_REASONING,)),
    Dialect("tokens that nobody sees", with_usage(prompt_tokens=PROMPT, completion_tokens=105), tokens=(PROMPT,
            105),
            sent=105, notes=(MORE_TOKENS_THAN_BYTES,)),
    Dialect("reasoning under both names", plain([chunk({"reasoning": "hm ", "reasoning_content": "hm "}),
            *WORDS, STOP,
                                                 usage_event(completion_tokens=6), DONE]),
            tokens=(PROMPT, 6), sent=6, chunks=6, answer_at=1),
    Dialect("thinking in parts", plain([chunk({"content": [THINKING]}), *WORDS, STOP,
            usage_event(completion_tokens=6), DONE]),
            tokens=(PROMPT, 6), sent=6, chunks=6, answer_at=1),
    Dialect("thoughts between tags", tagged("<think>", "hm", "</think>", "\n\n", "yes"), answer_at=4),
    Dialect("tags that are cut", tagged(" <th", "ink>hm</", "think", ">\n", "yes"), answer_at=4),
    Dialect("only the closing tag", tagged("so", " hm", "\n</think>", "yes", " it is"), answer_at=3),
    Dialect("a thought and the answer in one", tagged("<think>hm", "hm</think>yes", "a", "b", "c"), answer_at=1),
    Dialect("a thought that never ends", tagged("<think>", "hm", "hm", "hm", "hm"), answer_at=None),
    Dialect("a beginning like a tag", tagged("<", "table", ">", "a", "</table>"), answer_at=0),
    Dialect("finish_reason null as a word", plain([*[chunk({"content": "w "}, "null")] * N, STOP, USED, DONE])),
    Dialect("finish_reason null to the end", plain([*[chunk({"content": "w "}, "null")] * N, USED, DONE]), CUT_OFF,
            detail="[DONE] without finish_reason"),
    Dialect("delta is null", plain([ROLE, *WORDS, {**STOP, "choices": [{"delta": None,
            "finish_reason": "stop"}]}, USED, DONE])),
    Dialect("message for delta", plain([*[{"choices": [{"message": {"content": "w "}}]}] * N, STOP, USED,
            DONE])),
    Dialect("choices are null", plain([{"choices": None}, *NORMAL])),
    Dialect("two choices", plain([*TWO, STOP, usage_event(completion_tokens=6), DONE]), tokens=(PROMPT, 6),
            chunks=6,
            sent=6, body=("n=2", "max_tokens=3")),
    Dialect("a call without arguments", plain([chunk({"tool_calls": [CALL]}), chunk({}, "tool_calls"), USED,
            DONE]), chunks=1),
    Dialect("function_call", plain([*[chunk({"function_call": {"arguments": "x"}})] * N, chunk({},
            "function_call"), USED, DONE])),
    Dialect("refusal", plain([*[chunk({"refusal": "no "})] * N, STOP, USED, DONE])),
    Dialect("half an emoji", plain([*[chunk({"content": "\ud83d"})] * N, STOP, USED, DONE])),
    Dialect("error is empty", each(lambda event: {**event, "error": {}})),
    Dialect("error is a word", plain([ROLE, *WORDS, {"error": "overloaded"}]), **BROKEN,
            detail="error event: overloaded"),
    Dialect("error is a field", http(lines([ROLE, *WORDS]) + b'error: {"code":500,"message":"slot lost"}\n\n'),
            **BROKEN,
            detail="error event: slot lost"),
    Dialect("error is the event's name", http(lines([ROLE, *WORDS]) + b'event: error\ndata: {"message": "gone"}\n\n'),
            **BROKEN, detail="error event: gone"),
    Dialect("error is a finish reason", plain([ROLE, *WORDS, chunk({}, "insufficient_system_resource"), DONE]),
            **BROKEN,
            detail="finish_reason insufficient_system_resource"),
    Dialect("a list of one error", whole([{"error": {"code": 400, "message": "bad key"}}], 400), FAILED,
            **NOTHING,
            detail="status 400: bad key"),
    Dialect("detail", whole({"detail": "Not Found"}, 404), FAILED, **NOTHING, detail="status 404: Not Found"),
    Dialect("overloaded", whole({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
            529), REJECTED,
            **NOTHING, detail="status 529: busy"),
    Dialect("a login page", http(b"<html>login</html>", kind="text/html", chunked=False), FAILED, **NOTHING,
            detail="neither events nor JSON: <html>login"),
    Dialect("json lines", http(json.dumps(WORDS[0]).encode() + b"\n" + json.dumps(STOP).encode()), FAILED,
            **NOTHING,
            detail="not of /v1/chat/completions"),
    Dialect("json of something else", whole({"status": "ok"}), FAILED, **NOTHING,
            detail="not of /v1/chat/completions"),
    Dialect("only comments", http(b": ping\n\n: ping\n\n"), CUT_OFF, **NOTHING,
            detail="the stream ended before an event"),
    Dialect("words of its own", plain([{"status": "quota used up"}]), CUT_OFF, **NOTHING,
            detail='the stream ended without [DONE]; it said: {"status": "quota used up"}'),
    Dialect("brotli", http(b"\x0b\x02\x80", headers="content-encoding: br\r\n"), FAILED, **NOTHING,
            detail="content-encoding 'br' was not asked for"),
    Dialect("gzip as a transfer", http(lines(NORMAL)).replace(b": chunked", b": gzip, chunked"), CUT_OFF,
            **NOTHING,
            detail="RemoteProtocolError: transfer-encoding 'gzip, chunked'", closes=True),
    Dialect("stream=false", whole(ANSWER), **NOT_STREAMED_ANSWER, body=("stream=false",)),
    Dialect("elsewhere", http(b"", 308, headers="location: ../b\r\n", chunked=False), FAILED, **NOTHING,
            detail="status 308: redirects to http://127.0.0.1"),
    Dialect("no [DONE], leniently", plain(NORMAL[:-1]), lenient=True,
            notes=("counted as completed without [DONE] (--lenient)",)),
    Dialect("no finish_reason, leniently", plain([ROLE, *WORDS, USED, DONE]), lenient=True,
            notes=("counted as completed without finish_reason (--lenient)",)),
    Dialect("neither, leniently", plain([ROLE, *WORDS]), CUT_OFF, lenient=True, **NO_USAGE),
    Dialect("broken off, leniently", plain(NORMAL[:-1])[:-5], CUT_OFF, lenient=True, closes=True),
    Dialect("text", plain([*[{"choices": [{"text": "w ", "finish_reason": None}]}] * N,
                           {"choices": [{"text": "", "finish_reason": "length"}]}, {"choices": [],
            "usage": USAGE}, DONE]),
            **at(COMPLETIONS)),
    Dialect("text in one piece", whole({"choices": [{"text": "w w", "finish_reason": "stop"}], "usage": USAGE}),
            **at(COMPLETIONS, **NOT_STREAMED_ANSWER)),
    Dialect("a vector", whole({"data": [{"embedding": [0.5, 1.0]}], "usage": {"prompt_tokens": 7,
            "total_tokens": 7}}),
            **at(EMBEDDINGS, chunks=0, answer_at=None), tokens=(PROMPT, 0), sent=0),
    Dialect("a vector as base64", whole({"data": [{"embedding": "AAAAPw=="}], "usage": {"prompt_tokens": 7}}),
            **at(EMBEDDINGS, chunks=0, answer_at=None), tokens=(PROMPT, 0), sent=0),
    Dialect("no vector", whole({"data": [], "usage": {"prompt_tokens": 7}}), FAILED,
            **at(EMBEDDINGS, chunks=0, answer_at=None), tokens=(PROMPT, 0), sent=0,
            detail="not of /v1/embeddings"),
    Dialect("a response", typed(CREATED, *SAID, ENDED), **at(RESPONSES)),
    Dialect("a response that thinks", typed(CREATED, {"type": "response.reasoning_text.delta", "delta": "hm "},
            *SAID, {
        **ENDED, "response": {**RESPONSE, "usage": {"input_tokens": 7, "output_tokens": 6}}}),
            **at(RESPONSES, tokens=(PROMPT, 6), sent=6, chunks=6, answer_at=1)),
    Dialect("a response cut at its limit", typed(CREATED, *SAID, {"type": "response.incomplete", "response": {
        **RESPONSE, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}}),
            **at(RESPONSES)),
    Dialect("a response's call", typed(CREATED, *[{"type": "response.function_call_arguments.delta",
            "delta": "x"}] * N, ENDED),
            **at(RESPONSES)),
    Dialect("a response that sums up what it thinks", typed(CREATED,
            {"type": "response.reasoning_summary_text.delta",
        "delta": "hm"}, *SAID, {**ENDED, "response": {**RESPONSE, "usage": {**NAMES, "output_tokens": 45,
        "output_tokens_details": {"reasoning_tokens": 40}}}}),
            **at(RESPONSES, tokens=(PROMPT, 45)), notes=(HIDDEN_REASONING,)),
    Dialect("a response that failed", typed(CREATED, *SAID, {"type": "response.failed", "response": {
        **RESPONSE, "status": "failed", "error": {"code": "x", "message": "gone"}, "usage": None}}),
            **BROKEN, **at(RESPONSES), detail="error event: gone"),
    Dialect("a response's error", typed(CREATED, {"type": "error", "code": "x", "message": "busy"}),
            **{**BROKEN, **NOTHING}, **at(RESPONSES), detail="error event: busy"),
    Dialect("a response without its end", typed(CREATED, *SAID), CUT_OFF, **NO_USAGE, **at(RESPONSES),
            detail="the stream ended without response.completed"),
    Dialect("a response in one piece", whole({**RESPONSE, "output": [{"type": "message", "content": [
        {"type": "output_text", "text": "w w"}]}]}), **at(RESPONSES, **NOT_STREAMED_ANSWER)),
    Dialect("a message", typed(BEGUN, BLOCK, {"type": "ping"}, *DELTAS, STOPPED, LAST), **at(MESSAGES)),
    Dialect("a message that thinks", typed(BEGUN, {"type": "content_block_delta", "index": 0, "delta": {
        "type": "thinking_delta", "thinking": "hm "}}, BLOCK, *DELTAS, {**STOPPED,
            "usage": {"output_tokens": 6}}, LAST),
            **at(MESSAGES, tokens=(PROMPT, 6), sent=6, chunks=6, answer_at=1)),
    Dialect("a message that fails", typed(BEGUN, BLOCK, *DELTAS, {"type": "error", "error": {
        "type": "overloaded_error", "message": "Overloaded"}}), FAILED, tokens=(PROMPT, None), sent=None,
            **at(MESSAGES), detail="error event: Overloaded"),
    Dialect("a message without its end", typed(BEGUN, BLOCK, *DELTAS, STOPPED), CUT_OFF, **at(MESSAGES),
            detail="the stream ended without message_stop"),
    Dialect("a message in one piece", whole({"type": "message", "content": [{"type": "text", "text": "w w"}],
                                             "stop_reason": "end_turn", "usage": NAMES}),
            **at(MESSAGES, **NOT_STREAMED_ANSWER)),
)  # fmt: skip
