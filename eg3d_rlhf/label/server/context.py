"""What the routes share: the server's parts, and who asks."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from eg3d_rlhf.label.records import Mode
from eg3d_rlhf.label.server.errors import Refusal
from eg3d_rlhf.label.server.identity import Identities, Identity
from eg3d_rlhf.label.server.options import AppOptions
from eg3d_rlhf.label.server.shelf import Shelf
from eg3d_rlhf.label.store import Store, StoredCampaign


@dataclass(frozen=True, kw_only=True)
class Context:
    """One server's parts."""

    options: AppOptions
    campaign: StoredCampaign
    identities: Identities
    shelf: Shelf
    files: dict  # name -> pages.StaticFile
    page_version: str

    @property
    def store(self) -> Store:
        """Where everything is kept."""
        return self.options.store

    @property
    def blind(self) -> bool:
        """Whether this is a study."""
        return self.campaign.settings.mode is Mode.STUDY


async def identity_of(request: Request) -> Identity:  # async: nothing to wait for, and no thread
    """The identity that the gate has found."""
    return request.scope["state"]["identity"]


async def admin_of(identity: Annotated[Identity, Depends(identity_of)]) -> Identity:
    """The identity of an admin.

    Raises: Refusal 403.
    """
    if not identity.admin:
        raise Refusal(403, "Only admins may see this.", "Log in with an admin's token: tools/label.py add-annotator NAME --admin.")
    return identity


Who = Annotated[Identity, Depends(identity_of)]
Admin = Annotated[Identity, Depends(admin_of)]
