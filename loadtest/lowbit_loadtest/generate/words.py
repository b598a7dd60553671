"""Made-up text: words of a random generator that is told apart by what they are for."""

import numpy as np

from lowbit_loadtest.generate.arrivals import Draw, generator

# Short and common, so that most tokenizers give each one token after a space.
_WORDS = """
the of and to in is was for that it with as on be at by this had not are but from or have an they which
one you were all her she there would their we him been has when who will no more if out so up said what
its about than into them can only other time new some could these two may first then do any like my now
over such our man me even most made after also well before must back through years where much way down
should because long each just state those people too good make still see work life day part world here
house both under never same last while might great old year off come since against go came right used
take three small found large light water hand night air body book car city door earth fire game head idea
king land money name order paper question road school table voice war white young art bank blue boy child
church class color cost dark death doctor field food
"""
WORDS = np.array(_WORDS.split())


def draw_words(count: int, *seeds: int) -> list[str]:
    """`count` words, at least one; equal seeds give equal words."""
    return [str(word) for word in generator(Draw.WORDS, *seeds).choice(WORDS, max(1, count))]
