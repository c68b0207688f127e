//! Whether the host has IPsec policies: what goes past its stack is not shown to them.
//!
//! Owns the one question and its answer (linux/xfrm.h), for which there is no library.

use std::io;

use anyhow::{Context, Result, bail};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};

/// Types of messages (`enum xfrm_msg_type`), and of netlink's own answer to what it refuses.
const XFRM_MSG_NEWSPDINFO: u16 = 0x24;
const XFRM_MSG_GETSPDINFO: u16 = 0x25;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
/// Attribute with a `struct xfrmu_spdinfo`: six counts, the first three of policies of the host for
/// what comes in, what goes out and what is forwarded.
const XFRMA_SPD_INFO: u16 = 1;
const DIRECTIONS: usize = 3;
/// Bytes of a netlink header, of the word that follows it here, and of an attribute's header.
const HEADER: usize = 16;
const FLAGS: usize = 4;
const ATTRIBUTE: usize = 4;

/// Whether the calling thread's namespace has an IPsec policy that is not a single socket's.
///
/// # Errors
/// The kernel does not answer.
pub(super) fn has_policies() -> Result<bool> {
    let answer = match ask() {
        // A kernel without IPsec.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(false),
        answer => answer.context("ask for IPsec policies")?,
    };
    Ok(counts(&answer).context("count IPsec policies")?.iter().any(|&count| count != 0))
}

fn ask() -> io::Result<Vec<u8>> {
    let mut socket = Socket::new(NETLINK_XFRM)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut question = Vec::with_capacity(HEADER + FLAGS);
    question.extend_from_slice(&((HEADER + FLAGS) as u32).to_ne_bytes());
    question.extend_from_slice(&XFRM_MSG_GETSPDINFO.to_ne_bytes());
    question.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    // Sequence number, port, flags.
    question.extend_from_slice(&[0; 8 + FLAGS]);
    socket.send(&question, 0)?;
    Ok(socket.recv_from_full()?.0)
}

/// The numbers of policies by direction.
fn counts(answer: &[u8]) -> Result<[u32; DIRECTIONS]> {
    let half = |at: usize| Some(u16::from_ne_bytes(answer.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    match half(4) {
        Some(XFRM_MSG_NEWSPDINFO) => {}
        Some(NLMSG_ERROR) => {
            let code = word(HEADER).context("read an error")?.cast_signed();
            return Err(io::Error::from_raw_os_error(-code).into());
        }
        kind => bail!("the kernel answers with a message of type {kind:?}"),
    }
    let mut at = HEADER + FLAGS;
    while let (Some(length), Some(kind)) = (half(at), half(at + 2)) {
        if kind == XFRMA_SPD_INFO {
            let count = |n: usize| word(at + ATTRIBUTE + 4 * n).context("read a count");
            return Ok([count(0)?, count(1)?, count(2)?]);
        }
        // Attributes begin at multiples of four bytes; one of no length would never end.
        at += usize::from(length).next_multiple_of(4).max(ATTRIBUTE);
    }
    bail!("the kernel's answer has no counts")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(kind: u16, rest: &[u32]) -> Vec<u8> {
        let mut bytes = ((HEADER + 4 * rest.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&[0; 10]);
        bytes.extend(rest.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
    }

    fn attribute(length: u16, kind: u16) -> u32 {
        let ([a, b], [c, d]) = (length.to_ne_bytes(), kind.to_ne_bytes());
        u32::from_ne_bytes([a, b, c, d])
    }

    #[test]
    fn counts_stand_behind_other_attributes() {
        let rest = [0, attribute(6, 9), 7, attribute(28, XFRMA_SPD_INFO), 1, 2, 3, 4, 5, 6];
        assert_eq!(counts(&answer(XFRM_MSG_NEWSPDINFO, &rest)).unwrap(), [1, 2, 3]);
    }

    #[test]
    fn bad_answers_are_errors() {
        let denied = (-libc::EPERM).cast_unsigned();
        for (bytes, part) in [
            (answer(NLMSG_ERROR, &[denied]), "not permitted"),
            (answer(XFRM_MSG_NEWSPDINFO, &[0]), "no counts"),
            (answer(XFRM_MSG_NEWSPDINFO, &[0, attribute(0, 9)]), "no counts"),
            (answer(XFRM_MSG_NEWSPDINFO, &[0, attribute(28, 1), 1]), "read a count"),
            (Vec::new(), "message of type"),
        ] {
            let error = format!("{:#}", counts(&bytes).unwrap_err());
            assert!(error.contains(part), "{error}");
        }
    }
}
