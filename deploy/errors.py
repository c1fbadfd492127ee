"""DeployError: what a user can mend. The CLI prints its message without a traceback and exits 2."""


class DeployError(Exception):
    """A problem with what was given: a file, a setting, a machine.

    Reads `where: what is wrong, what was given; mend`.
    """
