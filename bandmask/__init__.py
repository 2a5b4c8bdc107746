"""Fine-tune satellite image encoders to see through missing spectral bands, and measure what it buys.

Modules, in the order data flows: `bands`, `masking`, `packs`, `datasets`, `batches`, `imputation`, `encoders`,
`objectives`, `heads`, `metrics`, `training`, `results`, `viewer`. Import the one you need; nothing heavy is
imported here.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("bandmask")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0+unknown"
