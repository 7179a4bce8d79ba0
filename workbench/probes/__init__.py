"""One file = one method = one paper. Each probe asks a question of a frozen model and returns a Result.

result = SomeProbe(settings).run(subject, data)
A new probe is one new file here: nothing has to be registered, the contract tests find every subclass of `Probe`.
"""
