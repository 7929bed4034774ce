"""Losses of other libraries, by their own names and signatures, on the ops of ltood_fast.

Each file is imported on demand and needs its library: ``from ltood_fast.integrations.open_clip import ClipLoss`` in
place of ``from open_clip.loss import ClipLoss``. A class subclasses the library's. Calls that the ops do not serve go
to it; ``calls`` counts both.
"""
