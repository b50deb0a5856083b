"""The base of all errors that a user can act on."""


class UserError(Exception):
    """Its message is all that a user needs: what is wrong and what to do. Commands print it without a traceback."""
