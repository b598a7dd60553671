"""Which sessions of a recording are played, and when: what the section `arrivals` of kind `replay` says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.schedule import Recording
from lowbit_loadtest.generate.traces.read import read_recording
from lowbit_loadtest.generate.traces.recorded import RecordedSession, RecordedTurn
from lowbit_loadtest.sections.arrivals import Replay


@dataclass(frozen=True)
class Played:
    """Sessions in order of time, their times from the first that is played; and what was done to them."""

    sessions: tuple[RecordedSession, ...]
    recording: Recording

    @property
    def times_s(self) -> list[float]:
        return [session.at_s or 0.0 for session in self.sessions]


def play(replay: Replay, requests: int | None = None, duration_s: float | None = None) -> Played:
    """At most `requests` sessions that begin within `duration_s`; raises ConfigError naming the file and the line."""
    name, recorded = read_recording(Path(replay.path), "trace", replay.format)
    _check_times(replay, name, recorded)
    kept = [session for session in recorded if session.turns]
    answered = [session for session in kept if not _all_without_output(session)]
    sessions = kept if replay.without_output == "send" else answered
    timed = _timed(sessions, replay)
    timed = [session for session in timed if duration_s is None or (session.at_s or 0.0) < duration_s][
        :requests
    ]
    if not timed:
        raise ConfigError(f"trace {replay.path} has no request after skip_s = {replay.skip_s:g}")
    limited = tuple(_limited(session, replay) for session in timed)
    cut = sum(before != after for before, after in zip(timed, limited, strict=True))
    facts = describe(name, recorded, limited)
    return Played(limited, replace(facts, cut_to_limits=cut, skipped=len(kept) - len(sessions)))


def describe(name: str, recorded: Sequence[RecordedSession], played: Sequence[RecordedSession]) -> Recording:
    """What the result says of a recording."""
    turns = [turn for session in played for turn in session.turns]
    return Recording(
        name,
        len(recorded),
        len(played),
        without_prompt=sum(turn.prompt_tokens == 0 for turn in turns),
        without_output=sum(turn.output_tokens == 0 for turn in turns),
    )


def _check_times(replay: Replay, name: str, recorded: Sequence[RecordedSession]) -> None:
    untimed = next((index for index, one in enumerate(recorded, 1) if one.at_s is None), None)
    if untimed is not None:
        which = "" if all(one.at_s is None for one in recorded) else f" in row {untimed}"
        raise ConfigError(
            f"trace {replay.path} ({name}) has no time{which} to replay; give it as "
            "prompts: {kind: file, path: …} with arrivals of another kind"
        )
    if replay.max_prompt_tokens is not None and any(turn.messages for one in recorded for turn in one.turns):
        raise ConfigError(
            f"trace {replay.path} ({name}) has texts, which max_prompt_tokens cannot cut; leave it out"
        )


def _timed(sessions: Sequence[RecordedSession], replay: Replay) -> list[RecordedSession]:
    """In order of time, counted from the first that is played; recorded pauses are as much shorter."""
    ordered = sorted(sessions, key=lambda session: session.at_s or 0.0)
    first_s = (ordered[0].at_s or 0.0) + replay.skip_s if ordered else 0.0
    played = [session for session in ordered if (session.at_s or 0.0) >= first_s]
    start_s = (played[0].at_s or 0.0) if played else 0.0
    return [
        replace(
            one,
            at_s=((one.at_s or 0.0) - start_s) / replay.speed,
            turns=tuple(_faster(turn, replay.speed) for turn in one.turns),
        )
        for one in played
    ]


def _faster(turn: RecordedTurn, speed: float) -> RecordedTurn:
    return turn if turn.pause_s is None else replace(turn, pause_s=turn.pause_s / speed)


def _all_without_output(session: RecordedSession) -> bool:
    return all(turn.output_tokens == 0 for turn in session.turns)


def _limited(session: RecordedSession, replay: Replay) -> RecordedSession:
    return replace(session, turns=tuple(_within_limits(turn, replay) for turn in session.turns))


def _within_limits(turn: RecordedTurn, replay: Replay) -> RecordedTurn:
    prompt, output = turn.prompt_tokens, turn.output_tokens
    if prompt is not None and replay.max_prompt_tokens is not None:
        prompt = min(prompt, replay.max_prompt_tokens)
    if output is not None and replay.max_output_tokens is not None:
        output = min(output, replay.max_output_tokens)
    return replace(turn, prompt_tokens=prompt, output_tokens=output)
