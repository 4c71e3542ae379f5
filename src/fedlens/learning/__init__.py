"""Models, client work, aggregators and the processes that run them in rounds, all written in the language."""

from fedlens.learning.evaluation import Evaluation as Evaluation
from fedlens.learning.evaluation import build_fed_eval as build_fed_eval
from fedlens.learning.fed_avg import build_unweighted_fed_avg as build_unweighted_fed_avg
from fedlens.learning.fed_avg import build_weighted_fed_avg as build_weighted_fed_avg
from fedlens.learning.fed_prox import build_unweighted_fed_prox as build_unweighted_fed_prox
from fedlens.learning.fed_prox import build_weighted_fed_prox as build_weighted_fed_prox
from fedlens.learning.local_models import LocalModel as LocalModel
from fedlens.learning.local_models import LocalModels as LocalModels
from fedlens.learning.own_process import from_computations as from_computations
from fedlens.learning.process import LearningProcess as LearningProcess
from fedlens.learning.state import ServerState as ServerState
