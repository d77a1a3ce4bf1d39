"""The command line: `nbdbackup VERB ...`.

Every verb is a module here with two functions:

    add_parser(verbs)   adds its argparse parser, whose help says what happens to data
    run(namespace)      turns the Namespace into a frozen options dataclass at once, acts
                        on that, and returns the exit status

Law: a Namespace goes no further than `run`. Errors are raised (`nbdbackup.errors`) and
become one line and an exit status in `failures.py`, nowhere else.

`main.py` imports only the module of the verb that was asked for, so a module may import
whatever its verb needs; rich, which is slow to import, only where it draws.
"""
