"""Shapes judged one by one: planned, answered on their own scale, checked like pairs, exported as unpaired
labels.
"""

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.people.label.archive import export_judgements, import_judgements
from eg3d_rlhf.people.label.entities import Answer, CampaignSettings, Choice, Kind, Mode, PlannedPair
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.people.label.pairing import plan as plan_pairs
from eg3d_rlhf.people.label.quality import quality_report
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_labels import (
    LabelFilters,
    export_labels,
    export_unpaired,
    store_preferences,
)
from eg3d_rlhf.preferences.unpaired import load_unpaired
from tests.people.label.plans import answer_all, shape, singles
from tests.rejections import raising


def settings(scale: str = "thumbs", **values) -> CampaignSettings:
    return CampaignSettings(
        **{"name": "singles", "mode": Mode.SINGLE, "scale": scale, "swap_share": 0, "seed": 1, **values}
    )


def test_thumbs_are_kept_repeated_checked_and_exported(store, tmp_path):
    made = settings(annotators_per_pair=2, repeat_share=0.2, repeat_gap=3, gold_every=8)
    campaign = store.create_campaign(made, singles(30, gold=4, training=1))
    ann, ben = (store.annotator_without_token(name).id for name in ("ann", "ben"))
    gold = range(1, 5)
    answer_all(store, campaign, ann, lambda s, _: Choice.DOWN if s.seed in gold or s.seed % 2 else Choice.UP)
    answer_all(
        store,
        campaign,
        ben,
        lambda s, _: Choice.DOWN if s.seed not in gold and (s.seed % 2 or s.seed == 20) else Choice.UP,
    )
    report = quality_report(store.judgements())
    fine, careless = report["annotators"]
    assert (fine["gold_accuracy"], careless["gold_accuracy"]) == (1.0, 0.0) and fine["gold_n"] >= 3
    assert fine["self_consistency"] == careless["self_consistency"] == 1.0 and fine["self_consistency_n"] >= 4
    assert fine["swap_consistency"] is None and fine["left_share"] is None and 0.3 < fine["good_share"] < 0.6
    kappa = report["agreement"]["cohen_kappa"][0]
    assert (
        kappa["n"] == 30
        and 0.85 < kappa["kappa"] < 1
        and 0.85 < report["agreement"]["krippendorff_alpha"] < 1
    )
    assert report["bradley_terry"] == [] and report["cycles"]["triples"] == 0
    path = export_unpaired(store, tmp_path / "labels.jsonl", drop_repeats=True, least_gold_accuracy=0.8)
    labels = load_unpaired(path)
    assert {label.seed: label.label for label in labels} == {
        seed: seed % 2 == 0 for seed in range(5, 35)
    } and len(labels) == 30
    assert (
        {label.annotator for label in labels} == {"ann"}
        and labels[0].psi == 0.7
        and labels[0].extra["campaign"] == "singles"
    )
    assert len(load_unpaired(export_unpaired(store, path, campaign="singles"))) > 60, (
        "both annotators, and repeats"
    )


def test_scores_say_good_from_four_on(store, tmp_path):
    campaign = store.create_campaign(settings("scores", gold_every=5, repeat_share=0), singles(12, gold=3))
    who = store.annotator_without_token("ann").id
    answer_all(store, campaign, who, lambda shown, _: Choice(str(0 if shown.seed < 3 else shown.seed % 6)))
    labels = load_unpaired(export_unpaired(store, tmp_path / "labels.jsonl"))
    assert {label.seed: (label.score, label.preferred) for label in labels} == {
        s: (s % 6, s % 6 >= 4) for s in range(3, 15)
    }
    assert quality_report(store.judgements())["annotators"][0]["gold_accuracy"] == 1.0
    path = export_judgements(store, tmp_path / "all.jsonl")
    with Store.open(f"sqlite:///{tmp_path / 'other.db'}") as other:  # judgements move whole
        assert import_judgements(other, path) == len(list(store.judgements()))
        assert load_unpaired(export_unpaired(other, tmp_path / "moved.jsonl")) == labels


def test_every_campaign_has_its_own_answers_and_labels(store, tmp_path):
    campaign = store.create_campaign(settings(), singles(4))
    pairs = store.create_campaign(
        CampaignSettings(name="pairs"), [PlannedPair(first=shape(100), second=shape(101))]
    )
    who = store.annotator_without_token("ann").id
    given = store.assignments(campaign, who, 1)[0]
    for choice in (Choice.LEFT, Choice.TIE, Choice.SCORE_3):
        with raising("up", "down", "skip", choice.value):
            store.submit(campaign, who, Answer(key="k", assignment=given.token, choice=choice))
    with raising("left", "right", "tie", "skip", "up"):
        store.submit(
            pairs,
            who,
            Answer(key="k", assignment=store.assignments(pairs, who, 1)[0].token, choice=Choice.UP),
        )
    answer_all(store, campaign, who, Choice.UP)
    assert store_preferences(store) == []
    with raising("campaign", "singles"):
        export_labels(store, tmp_path / "x.jsonl", campaign="singles")
    with raising("campaign", "pairs"):
        export_unpaired(store, tmp_path / "x.jsonl", campaign="pairs")
    assert not (tmp_path / "x.jsonl").exists()
    assert len(LabelFilters().keep(store.judgements(), Mode.SINGLE)) == 4


def test_plans_that_do_not_fit_are_rejected(store):
    for names, made in (
        (
            ("singles", "pair 0"),
            lambda: store.create_campaign(settings(), [PlannedPair(first=shape(1), second=shape(2))]),
        ),
        (("singles", "200000"), lambda: store.create_campaign(settings(), singles(1, first=200_000))),
        (("--swap-share", "0", "0.1"), lambda: settings(swap_share=0.1)),
        (("scale", "thumbs", "scores", "label"), lambda: CampaignSettings(name="x", scale="thumbs")),
        (
            ("--single", "--strategy=random", "tournament"),
            lambda: PairingOptions(single="thumbs", strategy="tournament"),
        ),
    ):
        with raising(*names):
            made()
    assert store.campaigns() == []


def test_the_plan_shows_each_seed_once_and_checks_are_damaged():
    options = PairingOptions(pairs=20, single="scores", gold=4, training=2, first_seed=500)
    planned = plan_pairs(options, load_generator()).pairs
    assert all(pair.first == pair.second for pair in planned)
    asked = [pair for pair in planned if pair.kind is Kind.PAIR]
    assert sorted(pair.first.seed for pair in asked) == list(range(500, 520))
    known = [pair for pair in planned if pair.kind is not Kind.PAIR]
    assert len(known) == 6 and all(pair.first.degradation and pair.expected == "second" for pair in known)
    assert all(bool(pair.explanation) == (pair.kind is Kind.TRAINING) for pair in known)
