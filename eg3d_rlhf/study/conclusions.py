"""What a study's figures allow to be said, in sentences; reads the analysis alone."""



FEW_ANNOTATORS = 5  # below, the interval rests on very little
WIDE = 0.15  # half a width beyond which a study says little


def conclusions(analysis: dict) -> list[str]:
    """Sentences in the order in which they matter."""
    result, design = analysis["result"], analysis["design"]
    out = []
    if analysis["interim"]:
        out.append(
            f"INTERIM: {analysis['answered']} of {design['trials']} trials were answered when this was made. The stopping rule is not met; "
            "deciding on such a look makes false alarms more frequent than the interval says."
        )
    if result["win_rate"] is None:
        return [*out, "No trial counts, so nothing can be said about the two generators. The exclusions below say why."]
    return [*out, *_main(result, design), *_tests(result), *_reach(result), *_doubts(analysis)]


def percent(value: float) -> str:
    """A share as text."""
    return f"{100 * value:.1f} %"


def p_value(p: float) -> str:
    """A p-value as text."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _main(result: dict, design: dict) -> list[str]:
    lo, hi = result["interval"]
    a, b = design["a"]["label"], design["b"]["label"]
    ties = "ties count half" if design["ties"] == "half" else "ties left out"
    first = (
        f"{b} won over {a} in {percent(result['win_rate'])} of {result['n']} trials ({ties}); the {result['confidence']:.0%} interval, "
        f"which allows for {result['annotators']} annotators and {result['latents']} latents, is {percent(lo)} to {percent(hi)}."
    )
    if lo > 0.5 or hi < 0.5:
        better, worse, least = (b, a, lo) if lo > 0.5 else (a, b, 1 - hi)
        second = f"The shapes of {better} are preferred to those of {worse}, in {percent(least)} of such trials at least, by that interval."
    else:
        second = (
            f"The interval contains one half: this study does not show that either is preferred. It rules out that {b} is preferred in "
            f"more than {percent(hi)} or in less than {percent(lo)} of such trials; it does not show that the two are equal."
        )
    return [first, second]


def _tests(result: dict) -> list[str]:
    if result["p_exact"] is None:
        return ["Every trial was a tie, so there is nothing to test."]
    text = f"Exact binomial test of the {result['a_wins'] + result['b_wins']} decided trials against one half: {p_value(result['p_exact'])}"
    effect = result["design_effect"]
    if effect > 1.2:
        text += (
            f". It takes trials as independent, but here they are worth {1 / effect:.0%} of as many independent ones (design effect "
            f"{effect:.1f}); allowing for that: {p_value(result['p_clustered'])}."
        )
    else:
        text += f"; allowing for annotators and latents: {p_value(result['p_clustered'])}."
    return [text]


def _reach(result: dict) -> list[str]:
    out, (lo, hi) = [], result["interval"]
    if result["annotators"] == 1:
        out.append("One annotator answered: the result speaks of that annotator's taste and of nobody else's.")
    elif result["annotators"] < FEW_ANNOTATORS:
        out.append(f"With {result['annotators']} annotators, how much people differ is barely known; that is why the interval is wide.")
    if hi - lo > 2 * WIDE:
        out.append(f"The interval is {percent(hi - lo)} wide: the study is too small for more than a first impression.")
    wide_lo, wide_hi = result["wilson"]
    if hi - lo < wide_hi - wide_lo:
        out.append(
            "The interval happens to be narrower than Wilson's for independent trials, because the annotators agreed more than chance "
            f"makes likely; who prefers caution reads Wilson's, {percent(wide_lo)} to {percent(wide_hi)}."
        )
    return out


def _doubts(analysis: dict) -> list[str]:
    out, result, sides = [], analysis["result"], analysis["sides"]
    all_in = analysis["sensitivity"]["without exclusions"]
    if analysis["exclusions"] and all_in["win_rate"] is not None:
        lo, hi = all_in["interval"]
        out.append(f"With nobody excluded the win rate is {percent(all_in['win_rate'])} ({percent(lo)} to {percent(hi)}).")
        if _verdict(all_in["interval"]) != _verdict(result["interval"]):
            out.append("That leads to another conclusion: the result rests on the exclusions.")
    if sides["p_random"] < 0.001:
        out.append(f"b was on the left in {sides['b_left']} of {sides['n']} trials, which random sides hardly give: look into it.")
    if sides["left_share"] is not None and not sides["left_ci"][0] <= 0.5 <= sides["left_ci"][1]:
        out.append(
            f"The annotators chose the left in {percent(sides['left_share'])} of the decided trials. Random sides keep this from favouring "
            "either generator; it moves the win rate towards one half."
        )
    return out


def _verdict(interval: list[float]) -> int:
    return (interval[0] > 0.5) - (interval[1] < 0.5)
