"""What hostile input is, and what must become of it: a result, or one line that the project itself has written."""

import warnings

from hypothesis import strategies as st

from lightning_l2l.commands.errors import find_foreseen

SCALARS = (
    st.integers(-3, 40)
    | st.sampled_from([10**5, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**30)])
    | st.floats()
    | st.sampled_from([1e3, 1e308, 5e-324, -0.0, 0.5])
    | st.booleans()
    | st.none()
    | st.text(max_size=5)
    | st.sampled_from(["5", "nan", "adam", "identity", "linear", "../x", "a\nb", "x" * 500])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


def result_of(function, *arguments, **options):
    """What a function returns; None where it raises an error that tells a user in one line what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Using a target size")  # torch's own clear line about mse_loss
            warnings.filterwarnings("ignore", "lr=.* is a factor|weight_decay=.* off each")  # of LearnedOptimizer
            return function(*arguments, **options)
    except (ValueError, TypeError, FileNotFoundError) as error:
        assert find_foreseen(error) is error, f"{type(error).__name__}: {error}"[:300]
        told = str(error)
        assert told and "\n" not in told and len(told) < 1500, told
        result_of.told = told
        return None
