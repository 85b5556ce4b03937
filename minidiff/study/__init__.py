"""The study of the methods of personalising: what each gives and costs, on subjects that the bundled model has never seen.

plan.py      every run: method, subject, seed, and what is changed about the method
learn.py     one run's training
measure.py   what the trained model draws, in numbers
run.py       all runs one after the other, each leaving one small file
report.py    these files to tables, figures, and sentences
"""
