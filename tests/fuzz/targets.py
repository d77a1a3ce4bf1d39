"""Every target by name: from any bytes to a word that says how far they got. Which ones, see the package."""

from collections.abc import Callable, Mapping

from tests.fuzz.client_negotiation import client, inquiry
from tests.fuzz.client_replies import replies
from tests.fuzz.server_negotiation import negotiation
from tests.fuzz.server_transmission import session, transmission
from tests.fuzz.texts import framing, uri

Target = Callable[[bytes], str]

TARGETS: Mapping[str, Target] = {
    "negotiation": negotiation,
    "transmission": transmission,
    "session": session,
    "client": client,
    "inquiry": inquiry,
    "replies": replies,
    "uri": uri,
    "framing": framing,
}
