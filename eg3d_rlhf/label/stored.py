"""What the store answers with, besides the shared records."""

from dataclasses import dataclass

from eg3d_rlhf.label.records import CampaignSettings

ROLES = ("annotator", "admin")
LOCAL = "local"  # whoever sits at the machine that the server runs on


class ConflictError(ValueError):
    """An answer to something that is answered already, or a key that was used for something else."""


@dataclass(frozen=True, kw_only=True)
class StoredCampaign:
    """A campaign as it was made; it never changes."""

    id: int
    settings: CampaignSettings
    created: float  # seconds since 1970
    pairs: int  # count, gold and training included


@dataclass(frozen=True, kw_only=True)
class StoredAnnotator:
    """Somebody who may answer; an admin may also see results and name annotators."""

    id: int
    name: str
    role: str  # one of ROLES
    created: float
    revoked: float | None  # when the token was withdrawn


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What became of an answer; it is on the disk when this is returned."""

    judgement: int  # id
    duplicate: bool  # the key was known: nothing was written, this is the first result
    training: bool
    correct: bool | None  # of training pairs with a known answer, unless skipped
    explanation: str  # of training pairs, else ''


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an annotator is in a campaign."""

    done: int  # trials that are answered; training aside
    total: int  # trials there will be, as far as can be told while others take from the same pairs
    training_left: int
    last_hour: int  # trials answered in the last 3,600 s
