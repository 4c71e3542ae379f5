"""From a computation of the language to a plan: normal form, then stages."""

from fedlens.compiler.disclosure import disclosure as disclosure
from fedlens.compiler.explain import explain as explain
from fedlens.compiler.explanation import Explanation as Explanation
from fedlens.compiler.levels import Level as Level
from fedlens.compiler.normalize import normalize as normalize
from fedlens.compiler.outputs import Disclosure as Disclosure
from fedlens.compiler.plan import ClientStage as ClientStage
from fedlens.compiler.plan import Input as Input
from fedlens.compiler.plan import Plan as Plan
from fedlens.compiler.plan import ServerStage as ServerStage
from fedlens.compiler.plan import Step as Step
from fedlens.compiler.plan import plan as plan
from fedlens.compiler.segments import Segment as Segment
from fedlens.compiler.segments import segments as segments
from fedlens.compiler.tap import tap as tap
from fedlens.compiler.taps import Tap as Tap
from fedlens.compiler.taps import taps as taps
