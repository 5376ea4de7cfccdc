"""The gate: may this version go live? A pure function of one report and one policy."""

from __future__ import annotations

from adapters.records import AdapterVersion
from adapters.reports import Decision, GatePolicy, Report, Role, Verdict, prompt_of


def rival_of(version: AdapterVersion, champion: AdapterVersion | None) -> AdapterVersion | None:
    """The champion that a version must hold its own against.

    None when there is none, when it is the version itself, or when it stands on another base: no server holds both, so
    no run can ask both.
    """
    if champion is None or champion.digest == version.digest or champion.base_digest != version.base_digest:
        return None
    return champion


def decide(
    report: Report | None, policy: GatePolicy | None, *, version_digest: str, champion_digest: str | None
) -> Decision:
    """Judge a report by a policy. Every rule that does not hold is a reason, in words with figures.

    version_digest: the candidate; champion_digest: its rival, None when it has none. UNDECIDED: what is there is
    no ground for a judgement (no policy, no report, too few examples). FAIL wins over UNDECIDED.
    """
    if policy is None:
        return Decision(
            Verdict.UNDECIDED,
            ("the adapter has no gate policy; set one that names the evaluation set by digest and a minimum n",),
        )
    if report is None:
        return Decision(
            Verdict.UNDECIDED, (f"no report of this version on the policy's data {policy.data_digest[:12]} exists",)
        )
    failed = [*_binding(report, policy, version_digest, champion_digest), *_quality(report, policy, champion_digest)]
    compared = [d for d in report.differences if d.metric == policy.metric]
    # A prompt that is there twice is no second piece of evidence.
    n = min([report.n, *(d.n for d in compared), len({prompt_of(e) for e in report.examples})])
    too_few = [f"n = {n} different prompts, the policy needs {policy.min_n}"] if n < policy.min_n else []
    verdict = Verdict.FAIL if failed else Verdict.UNDECIDED if too_few else Verdict.PASS
    return Decision(verdict, (*failed, *too_few), report.digest)


def _binding(report: Report, policy: GatePolicy, version_digest: str, champion_digest: str | None) -> list[str]:
    """What the report speaks of must be what is to be promoted, on the set that the policy names."""
    reasons = []
    if report.adapter_digest != version_digest:
        reasons.append(f"the report is about {report.adapter_digest[:12]}, the version is {version_digest[:12]}")
    if report.data_digest != policy.data_digest:
        reasons.append(f"the report is on data {report.data_digest[:12]}, the policy names {policy.data_digest[:12]}")
    if champion_digest is not None and report.champion_digest != champion_digest:
        against = f"champion {report.champion_digest[:12]}" if report.champion_digest else "no champion"
        reasons.append(f"the report was made against {against}, now {champion_digest[:12]} is champion")
    return reasons


def _quality(report: Report, policy: GatePolicy, champion_digest: str | None) -> list[str]:
    """The figures. Written as `not (x > y)`, so that a NaN never passes."""
    reasons = []
    candidate = report.system(Role.CANDIDATE)
    if candidate is None or candidate.digest != report.adapter_digest:
        return ["the report holds no scores of the candidate itself"]
    metric = policy.metric
    over_base = report.difference(Role.BASE, metric)
    if over_base is None:
        reasons.append(f"the report does not compare {metric} with the base")
    elif not over_base.low > policy.margin:
        reasons.append(
            f"{metric} over the base is {over_base.mean:+.4f}, its interval begins at {over_base.low:+.4f}; "
            f"it must begin above {policy.margin:+.4f}"
        )
    if champion_digest is not None:
        over_champion = report.difference(Role.CHAMPION, metric)
        if over_champion is None:
            reasons.append(f"the report does not compare {metric} with the champion")
        elif not over_champion.low > -policy.tolerance:
            reasons.append(
                f"{metric} over the champion is {over_champion.mean:+.4f}, its interval begins at "
                f"{over_champion.low:+.4f}; it must begin above {-policy.tolerance:+.4f}"
            )
    if not candidate.empty_rate <= policy.max_empty_rate:
        reasons.append(
            f"{candidate.empty_rate:.1%} of the answers are empty, at most {policy.max_empty_rate:.1%} may be"
        )
    low, high = policy.length_ratio
    if not low <= candidate.length_ratio <= high:
        reasons.append(
            f"answers are {candidate.length_ratio:.2f} times as long as references; {low:g} to {high:g} is allowed"
        )
    return reasons
