"""Headers of HTTP responses that clients of several packages read."""

import email.utils
import time


def retry_after_seconds(header: str | None) -> float | None:
    """Return the seconds of a header Retry-After, a number or a date; None if it is neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        # The clocks of server and client may differ, so the date may be in the past.
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
