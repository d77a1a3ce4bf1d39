"""Commands about the daemon itself."""

from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command, command_names
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.schema import NoArguments
from nbdbackup.monitor.session import version


@command("query-version", NoArguments)
async def query_version(services: Services, arguments: NoArguments) -> Json:
    del services, arguments
    return version()


@command("query-commands", NoArguments)
async def query_commands(services: Services, arguments: NoArguments) -> Json:
    del services, arguments
    return [{"name": name} for name in command_names()]


@command("quit", NoArguments)
async def quit_daemon(services: Services, arguments: NoArguments) -> Json:
    """Begin to shut down; the answer still goes out."""
    del arguments
    services.request_shutdown()
    return {}
