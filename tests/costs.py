"""What units of work are taken to cost where plans are tested: round numbers."""

from sppnet.planning.costs import Costs

COSTS = Costs(
    start_embed=1.0,
    start_detect=2.0,
    read=0.1,
    embed=0.05,
    propose=0.2,
    encode=0.4,
    keep=0.06,
    fetch=0.02,
    pool=0.01,
    pool_window=1e-4,
    score_window=1e-5,
    score_pair=1e-6,
    mine_pair=5e-7,
    visit=1e-4,
    ridge_window=1e-3,
    ridge_square=1e-7,
    entry=1e7,
    vector=4000.0,
    pooled=2000.0,
    memory_embed=3e8,
    memory_detect=8e8,
    windows=1000.0,
    together=2,
    efficiency=1.0,
)
