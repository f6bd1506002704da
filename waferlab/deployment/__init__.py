"""The file that leaves: exported, checked, registered, run."""

from waferlab.deployment.predictor import Predictor as Predictor
