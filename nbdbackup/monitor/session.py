"""One QMP conversation: greeting, negotiation, one answer to each message. No socket here.

The order of the checks, and the texts, are QEMU's. An answer is either
`{"return": ..., "id": ...}` or `{"error": {"class", "desc"}, "id": ...}`.
"""

import logging
from collections.abc import Mapping
from enum import Enum

import nbdbackup
from nbdbackup.errors import NbdBackupError
from nbdbackup.job.events import Json
from nbdbackup.job.failures import describe
from nbdbackup.monitor.commands import command, find_command
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.errors import CommandNotFoundError, QmpError
from nbdbackup.monitor.schema import Arguments, convert_arguments

logger = logging.getLogger(__name__)

NEGOTIATE = "qmp_capabilities"


class Capability(Enum):
    """QMP's optional capabilities; none is offered here."""

    OOB = "oob"


class CapabilitiesArguments(Arguments, frozen=True, kw_only=True):
    enable: list[Capability] | None = None


@command(NEGOTIATE, CapabilitiesArguments)
async def qmp_capabilities(services: Services, arguments: CapabilitiesArguments) -> Json:
    """The one command before negotiation, and an error after it."""
    del services, arguments
    raise CommandNotFoundError("Capabilities negotiation is already complete, command ignored")


def version() -> dict[str, Json]:
    """What the greeting and query-version say that this is."""
    major, minor, micro = (int(part) for part in nbdbackup.__version__.split(".")[:3])
    return {
        "qemu": {"major": major, "minor": minor, "micro": micro},
        "package": f"nbdbackup {nbdbackup.__version__}",
    }


def greeting() -> dict[str, Json]:
    """The first thing that a client is sent."""
    return {"QMP": {"version": version(), "capabilities": []}}


def error_answer(error: Exception) -> dict[str, Json]:
    """The answer that tells of `error`; a bug is logged with its traceback."""
    if isinstance(error, NbdBackupError | OSError):
        error_class = error.error_class if isinstance(error, QmpError) else QmpError.error_class
        return {"error": {"class": error_class, "desc": describe(error)}}
    logger.error("internal error in a command", exc_info=error)
    text = f"internal error: {type(error).__name__}: {describe(error)} (the server's log has more)"
    return {"error": {"class": QmpError.error_class, "desc": text}}


class QmpSession:
    """The state of one client's conversation."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.is_negotiated = False
        """Whether the client has sent `qmp_capabilities`; before that it gets no events."""

    async def answer(self, message: Json) -> dict[str, Json]:
        """Do what `message` says and return the answer to it. Never raises for anything in it."""
        try:
            result = await self._execute(message)
            answer: dict[str, Json] = {"return": result}
        except Exception as error:
            answer = error_answer(error)
        if isinstance(message, dict) and "id" in message:
            answer["id"] = message["id"]
        return answer

    async def _execute(self, message: Json) -> Json:
        name, arguments = _dissect(message)
        if self.is_negotiated:
            return await find_command(name).call(self._services, arguments)
        if name != NEGOTIATE:
            raise CommandNotFoundError(f"Expecting capabilities negotiation with '{NEGOTIATE}'")
        wanted = convert_arguments(arguments, CapabilitiesArguments)
        for capability in wanted.enable or ():
            raise QmpError(f"Capability {capability.value} not available")
        self.is_negotiated = True
        return {}


def _dissect(message: Json) -> tuple[str, Mapping[str, Json]]:
    """The command and its arguments."""
    if not isinstance(message, dict):
        raise QmpError("QMP input must be a JSON object")
    for member, value in message.items():
        if member == "execute":
            if not isinstance(value, str):
                raise QmpError("QMP input member 'execute' must be a string")
        elif member == "arguments":
            if not isinstance(value, dict):
                raise QmpError("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise QmpError(f"QMP input member '{member}' is unexpected")
    if "execute" not in message:
        raise QmpError("QMP input lacks member 'execute'")
    return message["execute"], message.get("arguments", {})
