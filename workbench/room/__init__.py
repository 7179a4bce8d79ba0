"""A room: the desks for a class, from one loaded model in one process; visitors can neither run code nor read files.

Solara serves it: its virtual kernels share one process and one model, and know no way to execute what a browser sends.
Ten visitors at the steering desk of the organism took it from 393 to 577 MB, and 0.16 s of processor for each of their
first pictures. Voila starts a process with a model of its own per visitor: such a process alone is 414 MB and 6.7 s of
processor, and its page asks a CDN for a script. `bench/room.py` measures both.
"""
