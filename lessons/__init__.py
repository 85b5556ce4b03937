"""Lessons: percent scripts that run as programs, as cells in an editor, and as notebooks. The map of them is README.md.

NN_name.py      a lesson                              common.py       what a lesson calls: options, pictures, check
solutions/      its answers                           exercises.py    what is wrong with an answer, in a sentence
figures/        its pictures                          catalogue.py    the lessons as a list, and README.md's rows
pages/          it as Markdown, by rendered.py        interpreter.py  Triton without a GPU
page/           templates of the web page, by web.py  ptx.py          what Triton makes of a kernel
"""
