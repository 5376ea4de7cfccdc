"""The stages of the demo, in order. Each uses what the one before it made; each claim that fails ends the story."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.live import Live

from adapters.home import Home
from examples.demo_product import GATE_REFUSES, CommandFailed, Product, Streaming, figure, together
from examples.demo_registry import Registry, Version
from examples.demo_screen import Card, Screen, columns_of
from loadtests.figures import Outcome
from loadtests.run import LoadTestFailed, load
from loadtests.sse import Answer

HERE = Path(__file__).resolve().parent
SUMMARY, NAME = "docstring-summary", "docstring-name"
METRIC = "rouge1"
METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# Not from any package, so in no training set; short, so that the answers are the point.
FUNCTIONS = (
    'def f(path, size=65536):\n    digest = hashlib.sha256()\n    with open(path, "rb") as file:\n'
    "        while chunk := file.read(size):\n            digest.update(chunk)\n    return digest.hexdigest()",
    "def f(items, size):\n    for start in range(0, len(items), size):\n        yield items[start:start + size]",
)
_FLIP_AFTER_PIECES = 6
# How the product tells a job's progress into a pipe: "answers: 12/64  tokens 310".
_COUNTED = re.compile(r"([^:]+): (\d+)/(\d+)(.*)")


@dataclass(frozen=True, slots=True)
class Settings:
    """How large the story is told. Budgets in seconds, by stage; overrides: of the run files, as in --set."""

    budgets: Mapping[str, float]
    overrides: tuple[str, ...] = ()
    answer_tokens: int = 48
    flip_tokens: int = 200
    load_seconds: float = 15.0
    load_users: int = 6
    proves: bool = True


_BUDGETS = {
    "base": 60.0, "summary": 190.0, "name": 150.0, "bad": 50.0, "serve": 40.0, "evaluate": 90.0, "refuse": 60.0,
    "mixed": 15.0, "flip": 45.0, "rollback": 10.0, "load": 45.0,
}  # fmt: skip
FULL = Settings(_BUDGETS)
QUICK = Settings(
    dict.fromkeys(_BUDGETS, 60.0),
    overrides=(
        "data.limit=48", "data.eval_limit=8", "data.max_chars=160", "max_length=320", "eval.max_tokens=8",
        "optim.max_steps=6", "optim.batch_size=8", "checkpoint.every_steps=2",
        # With so little of everything only the machinery can be shown: every candidate passes against the base, and
        # none against a champion that it does not beat.
        "gate.min_n=4", "gate.margin=-1", "gate.tolerance=0", "gate.max_empty_rate=1", "gate.length_ratio=[0, 1000]",
    ),
    answer_tokens=12,
    flip_tokens=200,
    load_seconds=3.0,
    load_users=3,
    proves=False,
)  # fmt: skip


@dataclass
class Story:
    """One telling. kept: whether the home outlives it. reports: filled in as the stages make or find them."""

    product: Product
    screen: Screen
    settings: Settings
    base: str
    kept: bool = True
    reports: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def tell(self) -> None:
        """All of it. Raises ClaimFailed, CommandFailed, ServerFailed and what lies under them."""
        begun = time.monotonic()
        screen, budgets = self.screen, self.settings.budgets
        screen.say(f"Loraplane, from a frozen base to a served adapter; home {self.product.home.root}", "bold")
        registry = Registry(self.product, screen)
        with ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplane-demo-log-")))
            try:
                with screen.stage("Pull the base: no model hub needed", budgets["base"]):
                    self._pull()
                with screen.stage(f"Train {SUMMARY}: say in one line what a function does", budgets["summary"]):
                    summary = self._train(SUMMARY)
                with screen.stage(f"Train {NAME}: find a function's name", budgets["name"]):
                    name = self._train(NAME)
                with screen.stage("Train a bad candidate: shuffled answers, a quarter of the steps", budgets["bad"]):
                    bad = self._train(SUMMARY, "data.shuffle_targets=true", "optim.fraction=0.25")
                with screen.stage("Start the server", budgets["serve"]):
                    self._serve(logs / "serve.log")
                with screen.stage("Evaluate with ROUGE on held-out functions, and promote", budgets["evaluate"]):
                    for version in (summary, name):
                        self._promote(registry, version)
                with screen.stage("The gate refuses the bad candidate", budgets["refuse"]):
                    self._refuse(registry, bad, summary)
                with screen.stage("Base and both adapters in one batch, streaming", budgets["mixed"]):
                    self._mixed(summary, name)
                with screen.stage("Publish another version and flip the alias under a stream", budgets["flip"]):
                    early = self._early(registry, summary)
                    self._flip(summary, early)
                with screen.stage("Roll back", budgets["rollback"]):
                    self._roll_back(summary)
                seconds = self.settings.load_seconds
                with screen.stage(f"{seconds:g} s of load, every digest checked", budgets["load"]):
                    load_outcome = self._load()
                self._sum_up(summary, name, bad, load_outcome)
            finally:
                screen.console.print()
                screen.times()
                screen.say(f"{screen.claims} claims held; {time.monotonic() - begun:.0f} s in all", "bold")
        if self.kept:
            self._where_next()

    def _pull(self) -> None:
        self.screen.murmur(f"loraplane models pull {self.base}")
        base = self.product.run("models", "pull", self.base, "--json", on_line=self._murmur).document
        self.screen.say(f"{base['name']}: {base['parameters'] / 1e6:.0f} M parameters, digest {base['digest'][:12]}")
        if base["note"]:
            self.screen.say(base["note"], "dim")

    def _train(self, name: str, *overrides: str) -> Version:
        # --resume: a run that was interrupted goes on, any other begins at its beginning.
        words = ["train", str(HERE / f"{name}.yaml"), "--resume", "--json", *self._set(*overrides)]
        found = self.product.run(*words, on_line=self._training).last
        facts = found["facts"]
        version = Version(found["name"], found["version"], found["digest"], facts, Path(found["folder"]))
        if not found["fresh"]:
            self.screen.reuse(f"{version.id}, which this very run made before")
        self.screen.say(
            f"{version.id} {version.short}: {facts['steps']} steps on {facts['rows']} functions, loss "
            f"{facts['first_loss']:.2f} -> {facts['final_loss']:.2f}, {facts['seconds']:.0f} s, on {facts['device']}"
        )
        return version

    def _serve(self, log: Path) -> None:
        self.product.start_server(log)
        if self.product.server is None:
            self.screen.reuse(f"the server that holds this home, at {self.product.url}; it will be left running")
            return
        self.screen.murmur("loraplane serve --port 0")
        self.screen.say(f"ready at {self.product.wait_for_server()}; commands go through it from here on")

    def _promote(self, registry: Registry, version: Version) -> None:
        report = registry.report_for(version, self._murmur)
        self.reports[version.id] = report
        gain = figure(report, "base", METRIC)
        told = f"{METRIC} over the base {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}], n = {gain['n']}"
        self.screen.say(f"{version.id}: {told}")
        if self.settings.proves:
            self.screen.claim(f"{version.id} beats the base; the interval excludes zero", gain["low"] > 0, told)
        registry.make_champion(version, report)
        self.screen.claim(f"{version.name} is {version.id} now", registry.champion(version.name) == version.number)

    def _refuse(self, registry: Registry, bad: Version, champion: Version) -> None:
        self.screen.claim("the bad candidate is another version", bad.digest != champion.digest)
        self.reports[bad.id] = registry.report_for(bad, self._murmur, against=champion.digest)
        refused, said = False, "it was promoted"
        try:
            self.product.run("promote", bad.id, "--json")
        except CommandFailed as failure:
            refused, said = failure.code == GATE_REFUSES, failure.said
        self.screen.say(said.removeprefix("error[gate_refused]: ").partition(". Evaluate it")[0])
        self.screen.claim(f"the gate refuses {bad.id}", refused, said)
        live = registry.champion(champion.name)
        self.screen.claim(f"{champion.id} is still live", live == champion.number, f"version {live} is")

    def _mixed(self, summary: Version, name: Version) -> None:
        models = ("base", SUMMARY, NAME)
        tokens = self.settings.answer_tokens
        asks = [(model, function, tokens) for function in FUNCTIONS for model in models]
        streams = together(self.product, asks)
        self._watch(streams)
        answers = [(stream, self._checked(stream)) for stream in streams]
        for i, function in enumerate(FUNCTIONS):
            self.screen.console.print(f"\n{function}\n", markup=False, style="cyan")
            self.screen.side_by_side([_card(s, a) for s, a in answers[i * len(models) : (i + 1) * len(models)]])
        first_end = min(s.ended_s for s in streams)
        at_once = sum(s.begun_s < first_end for s in streams)
        self.screen.say(f"{at_once} of {len(streams)} answers were under way before the first had ended", "dim")
        named = {answer.named.digest for _, answer in answers if answer.named}
        self.screen.claim(
            "each answer names the weights that made it, and the registry agrees",
            named == {None, summary.digest, name.digest},
        )
        self.screen.claim("the requests shared the engine", at_once >= 2)
        if self.settings.proves:
            texts = [answer.text.strip() for _, answer in answers]
            differ = all(len(set(texts[i : i + 3])) == 3 for i in range(0, len(texts), 3))
            self.screen.claim("three behaviours on the same input, from one frozen base", differ)

    def _watch(self, streams: Sequence[Streaming]) -> None:
        """Show the answers grow, on a terminal; elsewhere just wait."""
        if not self.screen.console.is_terminal:
            return
        with Live(console=self.screen.console, transient=True, refresh_per_second=8) as live:
            while any(s.running for s in streams):
                cards = [Card(s.model, (), s.check.text) for s in streams]
                live.update(columns_of(cards, self.screen.console.width))
                time.sleep(0.1)

    def _early(self, registry: Registry, summary: Version) -> Version:
        found = registry.early_version(summary)
        if found is not None:
            self.screen.reuse(f"{found.id}, {summary.id} as it was after step {found.facts['steps']}")
            return found
        last = int(summary.facts["steps"])
        kept = [int(p.name.removeprefix("step-")) for p in (summary.folder / "steps").glob("step-*")]
        steps = [step for step in sorted(kept) if step < last]
        self.screen.claim("an earlier step of the training was kept", bool(steps))
        words = ["train", str(HERE / f"{SUMMARY}.yaml"), "--publish-step", str(steps[-1]), "--json", *self._set()]
        made = self.product.run(*words, on_line=self._training).last
        version = Version(made["name"], made["version"], made["digest"], made["facts"], summary.folder)
        self.screen.say(f"{version.id} {version.short} is published: step {steps[-1]} of {last}")
        return version

    def _flip(self, summary: Version, early: Version) -> None:
        running = Streaming(self.product, SUMMARY, FUNCTIONS[0], self.settings.flip_tokens, ignore_eos=True)
        while running.running and running.check.pieces < _FLIP_AFTER_PIECES:
            time.sleep(0.01)
        self.screen.say(
            f"a stream of {SUMMARY} runs; {early.id} is promoted now: by force, with a reason, for the show"
        )
        # Over HTTP: the command would take a second to start, and on a fast machine the stream would be over.
        self.product.post(
            f"/v1/adapters/{SUMMARY}/promote",
            {"version": early.number, "force": True, "reason": "demo: flip under a running stream"},
        )
        at_flip, still_running = running.check.pieces, running.running
        after = self._checked(Streaming(self.product, SUMMARY, FUNCTIONS[0], self.settings.answer_tokens))
        before = self._checked(running)
        self.screen.claim("the alias moved while the stream ran", still_running, "the stream had ended by then")
        self.screen.say(f"running stream: {_told(before)}, of {before.tokens} tokens {at_flip} came before the flip")
        self.screen.say(f"next request:   {_told(after)}")
        self.screen.claim("the running stream kept its version and digest to the end", _is(before, summary))
        self.screen.claim("the next request got the new version", _is(after, early))

    def _roll_back(self, summary: Version) -> None:
        move = self.product.run("rollback", SUMMARY, "--reason", "demo: the earlier step was for show", "--json")
        told = move.document
        self.screen.say(f"{SUMMARY}: version {told['from_number']} -> {told['to_number']}, by {told['who']}")
        answer = self._checked(Streaming(self.product, SUMMARY, FUNCTIONS[0], self.settings.answer_tokens))
        self.screen.claim(f"{SUMMARY} answers with {summary.id} again", _is(answer, summary), _told(answer))

    def _load(self) -> Outcome:
        self.screen.murmur(f"{self.settings.load_users} users ask base, names, aliases and pinned versions")
        try:
            found = load(self.product.url, users=self.settings.load_users, seconds=self.settings.load_seconds)
        except LoadTestFailed as error:
            self.screen.claim("the load test ran", False, str(error))
            raise
        total = found.total
        self.screen.say(
            f"{total.requests} requests, {total.tokens_per_s:.0f} tokens/s, TTFT p50 {total.ttft_p50_ms or 0:.0f} ms, "
            f"p95 {total.ttft_p95_ms or 0:.0f} ms, time per token p50 {total.tpot_p50_ms or 0:.0f} ms"
        )
        why = ", ".join(f"{name} x {count}" for name, count, _ in found.problems)
        self.screen.claim(f"all {total.digests_checked} answers were whole and had the right digest", found.good, why)
        return found

    def _sum_up(self, summary: Version, name: Version, bad: Version, load_outcome: Outcome) -> None:
        self.screen.console.print()
        rows = [
            *_rouge_rows(self.reports[summary.id], bad.id, self.reports[bad.id]),
            *_rouge_rows(self.reports[name.id]),
        ]
        title = "" if self.settings.proves else "  (quick: these figures prove nothing)"
        columns = ("TASK", "SYSTEM", *(m.upper() for m in METRICS), "OVER THE BASE, 95 % INTERVAL", "N")
        self.screen.table(columns, rows, f"ROUGE on held-out functions{title}")
        self.screen.console.print()
        rows = [
            (f.model, str(f.requests), f"{f.ttft_p50_ms or 0:.0f}", f"{f.tpot_p50_ms or 0:.0f}",
             f"{f.tokens_per_s:.1f}", str(f.digests_checked))
            for f in (*load_outcome.lines, load_outcome.total)
        ]  # fmt: skip
        columns = ("MODEL", "REQUESTS", "TTFT P50 MS", "TPOT P50 MS", "TOK/S", "DIGESTS CHECKED")
        self.screen.table(columns, rows, "Under load")

    def _where_next(self) -> None:
        say, root = self.screen.say, self.product.home.root
        here = "" if Home.find() == self.product.home else f"LORAPLANE_HOME={root} "
        body = json.dumps({"model": SUMMARY, "messages": [{"role": "user", "content": "def f(a): return a[::-1]"}]})
        say("")
        say("Where to go next:", "bold")
        say(f"  {here}make serve   # the same server on port 8000; then, elsewhere:")
        say(f"  curl localhost:8000/v1/chat/completions -H 'content-type: application/json' -d '{body}'")
        say(f"  {here}.venv/bin/loraplane history {SUMMARY}   # every move of the alias, and why")

    def _checked(self, stream: Streaming) -> Answer:
        """The answer, after every promise about it was found kept."""
        answer = stream.join()
        why = "; ".join(map(str, stream.violations))
        if why:
            self.screen.claim(f"the answer of {stream.model} is whole and rightly named", False, why)
        return answer

    def _set(self, *overrides: str) -> list[str]:
        return [word for setting in (*self.settings.overrides, *overrides) for word in ("--set", setting)]

    def _training(self, line: str) -> None:
        """What `loraplane train --json` tells while it works."""
        try:
            told = json.loads(line)
        except ValueError:
            return  # what libraries chat about on stderr
        if not isinstance(told, dict):
            return
        if told.get("event") == "step":
            self.screen.progress(told["what"], told["done"], told["total"], f"loss {told['loss']:.3f}")
        elif told.get("event") == "note":
            self.screen.murmur(told["text"])

    def _murmur(self, line: str) -> None:
        """What a command tells on stderr while it works; its JSON answer is not for showing."""
        counted = _COUNTED.fullmatch(line.strip())
        if counted is not None:
            what, done, total, figures = counted.groups()
            self.screen.progress(what, int(done), int(total), figures.strip())
        elif line.strip() and line.strip()[0] not in '{}[]"':
            self.screen.murmur(line.strip())


def _is(answer: Answer, version: Version) -> bool:
    named = answer.named
    return named is not None and (named.model, named.digest) == (version.id, version.digest)


def _told(answer: Answer) -> str:
    named = answer.named
    return "no weights named" if named is None else f"{named.model} {(named.digest or named.base_digest)[:12]}"


def _card(stream: Streaming, answer: Answer) -> Card:
    lines = (
        _told(answer),
        f"TTFT {(answer.ttft_s or 0) * 1000:.0f} ms, {answer.tokens} tokens, {answer.tokens_per_s:.1f} tokens/s",
    )
    return Card(stream.model, lines, answer.text)


def _rouge_rows(
    report: Mapping[str, Any], bad: str = "", bad_report: Mapping[str, Any] | None = None
) -> list[tuple[str, ...]]:
    """Base, candidate and, if given, the bad candidate of one task."""
    found = [(s["model"], s, report) for s in report["systems"] if s["role"] in ("base", "candidate")]
    if bad_report is not None:
        found += [(f"{bad} (bad)", s, bad_report) for s in bad_report["systems"] if s["role"] == "candidate"]
    rows = []
    for title, system, source in found:
        over = "-"
        if system["role"] == "candidate":
            gain = figure(source, "base", METRIC)
            over = f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
        scores = (f"{system['scores'][m]:.3f}" for m in METRICS)
        rows.append((report["adapter"], title, *scores, over, str(source["n"])))
    return rows
