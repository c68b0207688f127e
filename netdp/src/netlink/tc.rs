//! Filters of clsact qdiscs that run BPF programs: what comes before tcx (Linux 6.6).
//!
//! Owns the messages, and the place that our filters have among others'. Which programs have to be
//! where is the caller's to say. Works in the calling thread's network namespace.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use anyhow::{Context, Result, bail};
use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader,
        NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{
            TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage,
            TcOption,
        },
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// What the names of our filters begin with.
const OURS: &str = "netdp ";
/// Behind every filter whose priority the kernel chose (49152 and less): others come first, as at
/// tcx hooks.
const PRIORITY: u16 = 50_000;
/// The one filter of our priority.
const HANDLE: u32 = 1;
/// `ETH_P_ALL` in network byte order: filters see every protocol.
const EVERY_PROTOCOL: u32 = 0x0300;
/// The qdisc, and its parent (linux/pkt_sched.h).
const CLSACT: &str = "clsact";
const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_PARENT: u32 = 0xffff_fff1;

/// Which packets of an interface a filter sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those that it receives.
    Ingress,
    /// Those that it sends.
    Egress,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// `TC_H_MIN_INGRESS` and `TC_H_MIN_EGRESS` of a clsact qdisc.
    const fn parent(self) -> u32 {
        match self {
            Self::Ingress => 0xffff_fff2,
            Self::Egress => 0xffff_fff3,
        }
    }
}

/// A filter of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// What it was named.
    pub name: String,
    /// The kernel's id of the program that it runs.
    pub program: u32,
}

/// A socket for questions and orders, one after the other.
pub struct TrafficControl(Socket);

impl TrafficControl {
    /// Opens a socket in the calling thread's namespace.
    ///
    /// # Errors
    /// The kernel gives none.
    pub fn open() -> Result<Self> {
        let open = || -> io::Result<Self> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(Self(socket))
        };
        open().context("open a netlink socket for traffic control")
    }

    /// Interfaces with a clsact qdisc.
    ///
    /// # Errors
    /// The kernel does not list qdiscs.
    pub fn interfaces(&mut self) -> Result<Vec<u32>> {
        let mut interfaces = Vec::new();
        let all = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        self.ask(NLM_F_DUMP, all, |answer| {
            if let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = answer
                && is_of_kind(&qdisc, CLSACT)
            {
                interfaces.push(qdisc.header.index.cast_unsigned());
            }
        })
        .context("list qdiscs")?;
        Ok(interfaces)
    }

    /// Gives an interface a clsact qdisc. Returns whether it had none.
    ///
    /// # Errors
    /// There is no such interface, somebody has another qdisc in the place, or the kernel has none
    /// of the kind.
    pub fn add_clsact(&mut self, ifindex: u32) -> Result<bool> {
        let mut qdisc = message(ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0);
        qdisc.attributes.push(TcAttribute::Kind(CLSACT.to_owned()));
        let order = RouteNetlinkMessage::NewQueueDiscipline(qdisc);
        match self.order(NLM_F_CREATE | NLM_F_EXCL, order) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if !self.interfaces()?.contains(&ifindex) {
                    bail!(
                        "the interface with ifindex {ifindex} has an ingress qdisc of somebody \
                         else, where netdp needs clsact: remove it with `tc qdisc del … ingress`"
                    );
                }
                Ok(false)
            }
            Err(error) => Err(error).with_context(|| {
                format!("add a clsact qdisc to the interface with ifindex {ifindex}")
            }),
        }
    }

    /// Takes an interface's clsact qdisc away, unless it still has filters.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_clsact_without_filters(&mut self, ifindex: u32) -> Result<()> {
        for direction in Direction::ALL {
            if self.count(ifindex, direction)? > 0 {
                return Ok(());
            }
        }
        let qdisc = message(ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0);
        unless_gone(self.order(0, RouteNetlinkMessage::DelQueueDiscipline(qdisc)))
            .with_context(|| format!("remove the clsact qdisc of ifindex {ifindex}"))
    }

    /// The filter of ours, if there is one.
    ///
    /// # Errors
    /// The kernel does not list filters.
    pub fn filter(&mut self, ifindex: u32, direction: Direction) -> Result<Option<Filter>> {
        let mut found = None;
        self.for_each_filter(ifindex, direction, |filter| {
            if is_in_our_place(&filter) {
                found = ours(&filter);
            }
        })?;
        Ok(found)
    }

    /// Runs a program on an interface's packets; where a filter of ours runs another, this one takes
    /// its place in one step.
    ///
    /// # Errors
    /// There is no clsact qdisc, somebody else's filter is in our place, or the kernel refuses.
    pub fn put(
        &mut self,
        ifindex: u32,
        direction: Direction,
        name: &str,
        program: BorrowedFd<'_>,
    ) -> Result<()> {
        let mut stranger = false;
        self.for_each_filter(ifindex, direction, |filter| {
            stranger |= is_in_our_place(&filter) && ours(&filter).is_none();
        })?;
        if stranger {
            bail!(
                "the filter of priority {PRIORITY} on ifindex {ifindex} is somebody else's: \
                 give it another priority"
            );
        }
        let options = [
            TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned()),
            TcFilterBpfOption::ProgName(format!("{OURS}{name}")),
            TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
        ];
        let mut filter = place(ifindex, direction);
        filter.attributes = vec![
            TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
            TcAttribute::Options(options.map(TcOption::Bpf).to_vec()),
        ];
        // Without NLM_F_EXCL, what is there is changed: cls_bpf replaces under RCU.
        self.order(NLM_F_CREATE, RouteNetlinkMessage::NewTrafficFilter(filter))
            .with_context(|| format!("put a filter on the interface with ifindex {ifindex}"))
    }

    /// Takes our filter away; it may be gone already, or its interface.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&mut self, ifindex: u32, direction: Direction) -> Result<()> {
        if self.filter(ifindex, direction)?.is_none() {
            return Ok(());
        }
        let filter = RouteNetlinkMessage::DelTrafficFilter(place(ifindex, direction));
        unless_gone(self.order(0, filter))
            .with_context(|| format!("remove the filter of ifindex {ifindex}"))
    }

    fn count(&mut self, ifindex: u32, direction: Direction) -> Result<usize> {
        let mut count = 0;
        self.for_each_filter(ifindex, direction, |_| count += 1)?;
        Ok(count)
    }

    fn for_each_filter(
        &mut self,
        ifindex: u32,
        direction: Direction,
        mut each: impl FnMut(TcMessage),
    ) -> Result<()> {
        let all = message(ifindex, 0, direction.parent(), 0);
        let listed = self.ask(NLM_F_DUMP, RouteNetlinkMessage::GetTrafficFilter(all), |answer| {
            if let RouteNetlinkMessage::NewTrafficFilter(filter) = answer {
                each(filter);
            }
        });
        unless_gone(listed).with_context(|| format!("list the filters of ifindex {ifindex}"))
    }

    fn order(&mut self, flags: u16, order: RouteNetlinkMessage) -> io::Result<()> {
        self.ask(NLM_F_ACK | flags, order, drop)
    }

    /// Sends a message and reads answers to their end.
    fn ask(
        &mut self,
        flags: u16,
        question: RouteNetlinkMessage,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, question.into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        loop {
            let (bytes, _) = self.0.recv_from_full()?;
            let mut rest = &bytes[..];
            while let Some(length) = rest.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes)) {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest);
                // Messages begin at multiples of four (linux/netlink.h, NLMSG_ALIGN).
                let length = (length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                // What the library can't read is of a kind that is not ours.
                let Ok(message) = message else { continue };
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => each(answer),
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }
}

fn message(ifindex: u32, handle: u32, parent: u32, info: u32) -> TcMessage {
    let (handle, parent) = (TcHandle::from(handle), TcHandle::from(parent));
    let index = ifindex.cast_signed();
    TcMessage::from_parts(
        TcHeader { index, handle, parent, info, ..TcHeader::default() },
        Vec::new(),
    )
}

/// Where our filter is.
fn place(ifindex: u32, direction: Direction) -> TcMessage {
    let info = u32::from(PRIORITY) << 16 | EVERY_PROTOCOL;
    message(ifindex, HANDLE, direction.parent(), info)
}

fn is_in_our_place(filter: &TcMessage) -> bool {
    filter.header.info >> 16 == u32::from(PRIORITY) && u32::from(filter.header.handle) == HANDLE
}

fn is_of_kind(message: &TcMessage, wanted: &str) -> bool {
    let mut attributes = message.attributes.iter();
    attributes.any(|attribute| matches!(attribute, TcAttribute::Kind(kind) if kind == wanted))
}

/// A filter of ours, by its name.
fn ours(filter: &TcMessage) -> Option<Filter> {
    let options = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let (mut name, mut program) = (None, None);
    for option in options {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(found)) => name = found.strip_prefix(OURS),
            TcOption::Bpf(TcFilterBpfOption::ProgId(found)) => program = Some(*found),
            _ => {}
        }
    }
    Some(Filter { name: name?.to_owned(), program: program? })
}

/// Success also where the interface, the qdisc or the filter has gone.
fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT)) => Ok(()),
        other => other,
    }
}
