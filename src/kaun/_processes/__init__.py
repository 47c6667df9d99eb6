"""What the processes of one program tell each other: values, and that they have come to the same place.

All of it goes over JAX's coordination service, from host to host. A gather of one number by the devices would wait for
the steps that they still have to run, and could neither end after a time nor say which process is missing. Measured
with two processes on one machine: 1.0 ms for ``Channel.exchange``, 2.4 ms for a gather by gloo on idle devices.

``channel`` is where processes meet, ``calls`` which calls they make together and where each of them waits, ``service``
JAX's service and this process, ``failures`` the exceptions, ``single`` the calls of one step.
"""

from kaun._processes.calls import Call as Call
from kaun._processes.channel import Channel as Channel
from kaun._processes.channel import barrier as barrier
from kaun._processes.failures import failed_elsewhere as failed_elsewhere
from kaun._processes.service import is_first as is_first
from kaun._processes.service import this_process as this_process
from kaun._processes.service import timeout_of as timeout_of
from kaun._processes.service import told_before as told_before
from kaun._processes.single import failures_told as failures_told
from kaun._processes.single import mark_told as mark_told
from kaun._processes.single import meet as meet
from kaun._processes.single import tell_failure as tell_failure
from kaun._processes.single import wait_for_devices as wait_for_devices
from kaun._processes.single import wait_until_ready as wait_until_ready
