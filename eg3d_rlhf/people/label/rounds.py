"""A campaign of labels for one round of tuning: made from a plan's options, read when people have answered."""

from pathlib import Path

from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.entities import CampaignSettings, Kind
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.people.label.preferences import LabelFilters, preferences_of
from eg3d_rlhf.people.label.store_at import open_store
from eg3d_rlhf.preferences.labels import Preference

LEAST = 0.9  # share of the pairs that has to be answered, or skipped

ASKED = {"show_render": False, "both_bad": True, "questions": (), "reveal": False}  # as label.py asks, unless told otherwise


def command(url: str, campaign: str) -> str:
    """What people start to label."""
    return f"python tools/label.py --db={url} --campaign={campaign}"


def make_campaign(url: str, name: str, network: Path, pairing: PairingOptions) -> bool:
    """Plan and store a campaign on the shapes of `network`; one that is there is left as it is. Returns whether it was made.

    Raises: ValueError, OSError.
    """
    with open_store(url, create=True) as store:
        if store.campaign(name) is not None:
            return False
        defaults = launch.filled(dict.fromkeys(launch.SETTINGS), CampaignSettings) | ASKED
        request = launch.Request(name=name, network=str(network.resolve()), after=None, pairing=pairing, settings=defaults)
        store.create_campaign(*launch.plan_campaign(store, request, print))
        return True


def answers(url: str, name: str, generator: LoadedGenerator, pairs: int) -> list[Preference]:
    """The labels of a campaign of `pairs` pairs.

    Raises: ValueError while too few are answered, with the command to go on; for labels of another generator; and without any preference.
    """
    with open_store(url, create=False) as store:
        judged = len({row.pair for row in store.judgements(name) if row.kind is Kind.PAIR})
        labels = preferences_of(store, LabelFilters(campaign=name))
    least = max(1, round(LEAST * pairs))
    if judged < least:
        raise ValueError(f"{name}: expected answers to at least {least} of {pairs} pairs, got {judged}. Label on: {command(url, name)}")
    strange = {label.generator for label in labels} - {generator.hash}
    if strange:
        raise ValueError(
            f"{name}: expected judgements of generator {generator.hash[:12]}..., got some of {str(strange.pop())[:12]}.... Another network "
            "was labelled: restore the database, or start a new run."
        )
    return labels
