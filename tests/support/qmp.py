"""One QMP command at a time, quicker than a process of the command line for each."""

import json
import socket
from typing import Protocol

TIMEOUT_S = 30.0


class Controlled(Protocol):
    """Something with a control socket."""

    @property
    def control(self) -> object:
        """Its path."""


class Refused(Exception):
    """The server answered with an error; the text is its description."""


def execute(server: Controlled, command: str, **arguments: object) -> object:
    """What the command returns; '_' in names of arguments stands for '-'.

    Raises:
        Refused: it failed.
    """
    words = {name.replace("_", "-"): value for name, value in arguments.items()}
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(TIMEOUT_S)
        control.connect(str(server.control))
        with control.makefile("rw") as lines:
            lines.readline()
            for request in (
                {"execute": "qmp_capabilities"},
                {"execute": command, "arguments": words},
            ):
                lines.write(json.dumps(request) + "\n")
                lines.flush()
                answer: dict[str, object] = {}
                while "return" not in answer and "error" not in answer:
                    answer = json.loads(lines.readline())
                if "error" in answer:
                    error = answer["error"]
                    assert isinstance(error, dict)
                    raise Refused(error["desc"])
    return answer["return"]
