"""From a plan and a cohort to values: contexts, engines, and what goes in and comes out."""

from fedlens.runtime.asynchronous import AsyncContext as AsyncContext
from fedlens.runtime.asynchronous import async_context as async_context
from fedlens.runtime.cohort import Cohort as Cohort
from fedlens.runtime.context import Context as Context
from fedlens.runtime.context import become_default as become_default
from fedlens.runtime.context import current_context as current_context
from fedlens.runtime.context import use as use
from fedlens.runtime.debug import Debug as Debug
from fedlens.runtime.devices import ask_for_one_cpu_device_per_core as ask_for_one_cpu_device_per_core
from fedlens.runtime.engine import Engine as Engine
from fedlens.runtime.examples import Examples as Examples
from fedlens.runtime.local import Local as Local
from fedlens.runtime.programs import ProgramCall as ProgramCall
from fedlens.runtime.programs import ProgramContext as ProgramContext
from fedlens.runtime.programs import program_context as program_context
from fedlens.runtime.stage_log import configure as configure_log
from fedlens.runtime.values import ClientValues as ClientValues

configure_log()
ask_for_one_cpu_device_per_core()
become_default()
