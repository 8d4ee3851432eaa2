"""Who takes part: each file drives one program, each function of it one way of running that program.

A function takes the work, its own options and the turns: it prepares, says that it is ready, and does one unit of work
whenever it is its turn. Imports are inside the functions, so that a missing package costs one line of the report.
"""
