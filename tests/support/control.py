"""One command over the control socket, quicker than a process for each."""

import json
import socket
from pathlib import Path

from tests.support.server import Server

TIMEOUT_S = 30.0


class Refused(AssertionError):
    """The command was answered with an error, whose text this is."""


def execute(server: Server, command: str, **arguments: object) -> object:
    """What the QMP command returns; '_' in the names of `arguments` stands for '-'.

    Raises:
        Refused: an error. EOFError, OSError: the server was gone before the answer.
    """
    return execute_at(server.control, command, **arguments)


def execute_at(path: Path, command: str, **arguments: object) -> object:
    """As `execute`, of whoever speaks QMP at `path`."""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(TIMEOUT_S)
        control.connect(str(path))
        with control.makefile("rw") as lines:
            lines.readline()
            for name, words in (("qmp_capabilities", {}), (command, arguments)):
                request = {
                    "execute": name,
                    "arguments": {word.replace("_", "-"): words[word] for word in words},
                }
                lines.write(json.dumps(request) + "\n")
                lines.flush()
                answer: dict[str, object] = {}
                while "return" not in answer:
                    line = lines.readline()
                    if not line:
                        raise EOFError(f"no answer to {command}")
                    answer = json.loads(line)
                    if "error" in answer:
                        raise Refused(str(answer["error"]))
    return answer["return"]
