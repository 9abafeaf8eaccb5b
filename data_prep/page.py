"""placeholder"""

from data_prep.store import TokenStore


def write_page(store: TokenStore) -> None: ...
