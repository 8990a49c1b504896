"""The only code that knows DeepSpeed: its engines, expert-parallel groups, and where it keeps main parameters.

Nothing outside this folder imports ``deepspeed`` or touches its objects; a test checks that.
"""
