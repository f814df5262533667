"""One COMPOUND (RFC 8881 16.2): its context, and the loop over its operations.

The loop writes opcode and status of each result; an operation writes what follows. An operation
that fails is told by `NfsError`, an error of the core or bad XDR; what it had written is taken
back, and the COMPOUND ends there.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.nfs import constants as n
from extfs.nfs import credentials, filehandles, names
from extfs.nfs.effects import Steps
from extfs.nfs.errors import NfsError, status_of
from extfs.nfs.rpc import Credential
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.clients import Client
    from extfs.nfs.filehandles import Filehandle
    from extfs.nfs.riders import Mark, Marks, Ride
    from extfs.nfs.service import Connection, Service
    from extfs.nfs.sessions import Session, Slot
    from extfs.nfs.state import State, Stateid

__all__ = ["Compound", "Handler", "Operation"]

log = logging.getLogger("extfs.nfs")

TAG_MAX = 1024
_RESULT = struct.Struct(">II")
_TAG = struct.Struct(">QIII")
_TAG_REQUEST = 16
"""Bytes of it that say which request: session, slot, sequence number."""
_SETATTR = n.OP_SETATTR.to_bytes(4, "big")
_NO_ATTRIBUTES = bytes(4)
"""SETATTR4res has attrsset behind every status (RFC 8881 18.30.2)."""
_ERROR_ROOM = 16
"""Bytes that the result of an operation which failed may need beyond the limit."""


@dataclass(frozen=True, slots=True)
class Operation:
    """How an operation is run.

    `minor`: the lowest minor version that has it. `filehandle`: "", "current" or "both" (the saved
    one too) must be set. `reply_bytes`: what follows the status needs that much room, which is
    checked before it is run: for operations that change something and cannot be undone when the
    reply is too big.
    """

    handler: Handler
    minor: int = 1
    filehandle: str = ""
    reply_bytes: int = 0


Handler = Callable[["Compound", Reader, Writer], "Steps[None] | None"]

# Operations of NFSv4.0 that a 4.1 server must not implement (RFC 8881 18, table of 17).
_NOT_TO_IMPLEMENT = frozenset(
    (
        n.OP_OPEN_CONFIRM,
        n.OP_RENEW,
        n.OP_SETCLIENTID,
        n.OP_SETCLIENTID_CONFIRM,
        n.OP_RELEASE_LOCKOWNER,
    )
)
# May stand alone, without SEQUENCE, and then must (RFC 8881 2.10.6, 18.35 to 18.37, 18.50).
SESSIONLESS = frozenset(
    (
        n.OP_EXCHANGE_ID,
        n.OP_CREATE_SESSION,
        n.OP_BIND_CONN_TO_SESSION,
        n.OP_DESTROY_SESSION,
        n.OP_DESTROY_CLIENTID,
    )
)
_HIGHEST = {1: n.OP_RECLAIM_COMPLETE, 2: n.OP_REMOVEXATTR}


class Compound:
    """The context of one COMPOUND. `out` is its result, from the status on.

    `marks`: of a request in a persistent session. `retry`: it may have been sent to the server
    before a restart, which may have executed it, in whole or in part (riders.py, sessions.py).
    `after_sequence`: where in `out` and in the arguments the operations behind SEQUENCE begin.
    """

    __slots__ = (
        "after_sequence",
        "arguments",
        "client",
        "connection",
        "credential",
        "current",
        "limit",
        "marks",
        "minor",
        "op_count",
        "op_index",
        "out",
        "request_bytes",
        "retry",
        "saved",
        "saved_stateid",
        "service",
        "session",
        "slot",
        "stateid",
    )

    def __init__(self, service: Service, connection: Connection, credential: Credential) -> None:
        self.service = service
        self.connection = connection
        self.credential = credential
        self.minor = 1
        self.client: Client | None = None
        self.session: Session | None = None
        self.slot: Slot | None = None
        self.current: Filehandle | None = None
        self.saved: Filehandle | None = None
        self.stateid: Stateid | None = None
        self.saved_stateid: Stateid | None = None
        self.out = Writer()
        self.limit = service.options.sessionless_bytes
        self.request_bytes = 0
        self.op_count = 0
        self.op_index = 0
        self.marks: Marks | None = None
        self.retry = False
        self.after_sequence = (0, 0)

    # -- for operations --

    def room(self) -> int:
        """Bytes that this operation's result may still have."""
        return self.limit - len(self.out)

    def set_current(self, filehandle: Filehandle) -> None:
        """A new current filehandle; there is no current stateid any more (RFC 8881 16.2.3.1.2)."""
        self.current = filehandle
        self.stateid = None

    def set_stateid(self, stateid: Stateid) -> None:
        """The operation returned this stateid: it is the current one."""
        self.stateid = stateid

    def done(self, op: int) -> Mark | None:
        """The mark of this operation, if it was done before the server was killed."""
        return None if self.marks is None else self.marks.done(self.op_index, op)

    def before_done(self) -> bool:
        """Whether this operation, or one behind it, was done before the server was killed."""
        return self.marks is not None and self.marks.before_done(self.op_index)

    def ride(self, op: int) -> Ride | None:
        """What this operation, which must not be done twice, takes along when it is done.

        `NfsError`: it may not be done in this COMPOUND any more.
        """
        if self.marks is None:
            return None
        ride = self.marks.ride(self.op_index, op)
        assert self.session is not None
        self.session.ridden.add(self.marks.record.slot)
        return ride

    def tag(self, state: State) -> None:
        """This operation changes the state: for who asks `did` after a restart."""
        state.tag = self._tag()

    def did(self, state: State) -> bool:
        """Whether this operation has changed the state already, before a restart: it, or one behind
        it in the same request, changed it last."""
        if not self.retry or len(state.tag) != _TAG.size:
            return False
        tag = self._tag()
        return bool(
            tag[:_TAG_REQUEST] == state.tag[:_TAG_REQUEST]
            and _TAG.unpack(state.tag)[3] >= self.op_index
        )

    def _tag(self) -> bytes:
        if self.marks is None:
            return b""
        request = self.marks.record
        return _TAG.pack(request.session, request.slot, request.sequence, self.op_index)

    def ended(self, stateid: Stateid) -> bool:
        """Whether an operation that ends a state finds it ended, and may have done so itself."""
        return self.retry and self.service.states.is_past(stateid)

    def user(self) -> Credential:
        """Who calls, after the squash of the current export."""
        return credentials.user(self)

    def writable(self) -> None:
        """NFS4ERR_ROFS where nothing may be changed."""
        credentials.writable(self)

    def real(self) -> Filehandle:
        """The current filehandle; NFS4ERR_ROFS for a directory of the pseudo filesystem."""
        filehandle = self.current
        if filehandle is None:
            raise NfsError(n.NFS4ERR_NOFILEHANDLE)
        if filehandle.pseudo:
            raise NfsError(n.NFS4ERR_ROFS)
        return filehandle

    def regular(self) -> Filehandle:
        """The current filehandle, which must be of a regular file (RFC 8881 15.1.2.9)."""
        self.regular_size()
        assert self.current is not None
        return self.current

    def regular_size(self) -> tuple[int, int]:
        """The same: its inode and the file's size."""
        filehandle = self.current
        if filehandle is None:
            raise NfsError(n.NFS4ERR_NOFILEHANDLE)
        if filehandle.pseudo:
            raise NfsError(n.NFS4ERR_ISDIR)
        found = filehandles.stat(self, filehandle)
        kind = found.mode & 0o170000
        if kind == 0o100000:
            return filehandle.ino, found.size
        if kind == 0o040000:
            raise NfsError(n.NFS4ERR_ISDIR)
        raise NfsError(n.NFS4ERR_SYMLINK if kind == 0o120000 else n.NFS4ERR_WRONG_TYPE)

    # -- the loop --

    def run(self, arguments: Reader) -> Steps[bytes | bytearray]:
        """COMPOUND4args to COMPOUND4res. `XdrError`: they are none (GARBAGE_ARGS)."""
        self.arguments = arguments
        self.request_bytes = arguments.end
        tag = arguments.opaque(TAG_MAX)
        minor = arguments.u32()
        count = arguments.u32()
        out = self.out
        out.u32(n.NFS4_OK)
        out.opaque(tag)
        counted = len(out)
        out.u32(0)
        if minor not in _HIGHEST:
            out.put_u32(0, n.NFS4ERR_MINOR_VERS_MISMATCH)
            return bytes(out.buffer)
        if not names.is_utf8(tag):
            out.put_u32(0, n.NFS4ERR_INVAL)
            return bytes(out.buffer)
        self.minor = minor
        self.op_count = count
        status = n.NFS4_OK
        done = 0
        records = self.service.records
        staged = records.staged
        while done < count and status == n.NFS4_OK:
            begin = len(out)
            self.op_index = done
            done += 1
            try:
                op = arguments.u32()
            except XdrError:
                out.pack(_RESULT, n.OP_ILLEGAL, n.NFS4ERR_BADXDR)
                status = n.NFS4ERR_BADXDR
                break
            if op == n.OP_SEQUENCE and done == 1:
                replay, status = self._sequence()
                if replay is not None:
                    return replay
            else:
                steps, status = self._start(op)
                if steps is not None:
                    status = yield from self._rest(op, steps)
                if status and self.before_done():
                    done, begin, status = self._reply_lost()
        if done:
            status = yield from self._durable(staged, begin, status)
        out.put_u32(0, status)
        out.put_u32(counted, done)
        result = out.buffer  # nobody writes to it any more
        if self.slot is not None:
            self.service.sessions.end(self, result)
        return result

    def _durable(self, staged: int, begin: int, status: int) -> Steps[int]:
        """What the answer says is durable before it is said (see records.py).

        Whatever goes wrong, the request comes to its end: its slot is waiting for that.
        """
        records = self.service.records
        try:
            if records.owes(staged):
                yield from records.durable()
            return status
        except OSError as error:
            log.error("records of clients and states: %s", error)
            failed = status_of(error)
        except Exception:
            log.exception("records of clients and states")
            failed = n.NFS4ERR_SERVERFAULT
        self.service.count("server_faults")
        return self._failed(begin, failed) if status == n.NFS4_OK else status

    def _reply_lost(self) -> tuple[int, int, int]:
        """What is done was done after an operation that now fails: see riders.py.

        SEQUENCE stands, the operation after it gets the error (RFC 8881 18.46.3).
        """
        at, arguments = self.after_sequence
        self.out.truncate(at)
        op = Reader(self.arguments.buffer, arguments).u32()
        self.out.pack(_RESULT, op, n.NFS4_OK)
        self.service.count("replies_lost")
        return 2, at, self._failed(at, n.NFS4ERR_RETRY_UNCACHED_REP)

    def _sequence(self) -> tuple[bytes | None, int]:
        """The first operation is SEQUENCE; a retransmitted request has its result already."""
        out = self.out
        begin = len(out)
        out.pack(_RESULT, n.OP_SEQUENCE, n.NFS4_OK)
        try:
            replay = self.service.sessions.begin(self, self.arguments, out)
            self.after_sequence = len(out), self.arguments.pos
            return replay, n.NFS4_OK
        except NfsError as error:
            return None, self._failed(begin, error.status, error.body)
        except XdrError:
            return None, self._failed(begin, n.NFS4ERR_BADXDR)

    def _start(self, op: int) -> tuple[Steps[None] | None, int]:
        """Run the next operation; when it goes on in steps they are returned."""
        out = self.out
        begin = len(out)
        operation, status = self._find(op)
        if operation is None:
            out.pack(_RESULT, n.OP_ILLEGAL if status == n.NFS4ERR_OP_ILLEGAL else op, status)
            return None, self._failed(begin, status)
        out.pack(_RESULT, op, n.NFS4_OK)
        try:
            if _RESULT.size + operation.reply_bytes > self.limit - begin:
                raise NfsError(self._too_big())
            steps = operation.handler(self, self.arguments, out)
        except (NfsError, XdrError, OSError) as error:
            return None, self._error(op, begin, error)
        except Exception as error:
            return None, self._broken(op, begin, error)
        if steps is None:
            return None, self._fits(begin)
        return steps, n.NFS4_OK

    def _rest(self, op: int, steps: Steps[None]) -> Steps[int]:
        out = self.out
        begin = len(out) - _RESULT.size
        try:
            yield from steps
        except (NfsError, XdrError, OSError) as error:
            return self._error(op, begin, error)
        except Exception as error:
            return self._broken(op, begin, error)
        return self._fits(begin)

    def _find(self, op: int) -> tuple[Operation | None, int]:
        """The operation, or why it is not run."""
        if op == n.OP_SEQUENCE:
            return None, n.NFS4ERR_SEQUENCE_POS
        operation = self.service.operations.get(op)
        if operation is None or operation.minor > self.minor:
            known = op in n.OPERATION_NAMES and op <= _HIGHEST[self.minor]
            if not known:
                return None, n.NFS4ERR_OP_ILLEGAL
            if self.session is None and op not in SESSIONLESS:
                return None, n.NFS4ERR_OP_NOT_IN_SESSION
            return None, n.NFS4ERR_NOTSUPP
        if self.session is None:
            if op not in SESSIONLESS:
                return None, n.NFS4ERR_OP_NOT_IN_SESSION
            if self.op_count != 1:
                return None, n.NFS4ERR_NOT_ONLY_OP
        if operation.filehandle:
            if self.current is None:
                return None, n.NFS4ERR_NOFILEHANDLE
            if operation.filehandle == "both" and self.saved is None:
                return None, n.NFS4ERR_NOFILEHANDLE
        return operation, n.NFS4_OK

    # -- failures --

    def _error(self, op: int, begin: int, error: Exception) -> int:
        if isinstance(error, NfsError):
            return self._failed(begin, error.status, error.body)
        if isinstance(error, XdrError):
            return self._failed(begin, n.NFS4ERR_BADXDR)
        assert isinstance(error, OSError)
        status = status_of(error)
        if status == n.NFS4ERR_NOENT and self._gone():
            status = n.NFS4ERR_STALE
        if status == n.NFS4ERR_NOSPC and self.service.layouts.recall_any():
            status = n.NFS4ERR_DELAY  # what is held and not used is asked for first
        if status == n.NFS4ERR_IO:
            log.warning("%s: %s", n.OPERATION_NAMES.get(op, op), error)
        return self._failed(begin, status)

    def _gone(self) -> bool:
        """Whether it is the current filehandle's file itself that is not there any more."""
        filehandle = self.current
        if filehandle is None or filehandle.pseudo:
            return False
        try:
            self.service.fs.handle_check(filehandle.ino, filehandle.generation)
        except OSError:
            return True
        return False

    def _broken(self, op: int, begin: int, error: Exception) -> int:
        log.error("%s failed", n.OPERATION_NAMES.get(op, op), exc_info=error)
        self.service.count("server_faults")
        return self._failed(begin, n.NFS4ERR_SERVERFAULT)

    def _failed(self, begin: int, status: int, body: bytes = b"") -> int:
        out = self.out
        if not body and out.buffer[begin : begin + 4] == _SETATTR:
            body = _NO_ATTRIBUTES
        out.truncate(begin + 4)
        out.u32(status)
        out.raw(body)
        return status

    def _too_big(self) -> int:
        cached = self.slot is not None and self.slot.cached
        return n.NFS4ERR_REP_TOO_BIG_TO_CACHE if cached else n.NFS4ERR_REP_TOO_BIG

    def _fits(self, begin: int) -> int:
        """The result is in `out`: is there room for it (RFC 8881 2.10.6.4)?"""
        if len(self.out) <= self.limit:
            return n.NFS4_OK
        return self._failed(begin, self._too_big())
