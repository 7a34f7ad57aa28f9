"""Draft heads: small networks on the target model's hidden states that predict several tokens ahead."""

if not __name__.startswith("specdec."):
    raise ImportError("import it as specdec.heads: 'heads' alone is not a package of this project")

from specdec.heads.calibration import HeadCalibration
from specdec.heads.eagle3 import Eagle3Config, Eagle3Head
from specdec.heads.medusa import MedusaConfig, MedusaHeads

__all__ = ["Eagle3Config", "Eagle3Head", "HeadCalibration", "MedusaConfig", "MedusaHeads"]
