//! What the kernel takes for a flow of two halves, whoever opens it: one lookup that finds nothing,
//! two insertions in a hash table and one in a queue.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use super::{
    ADD, BPF_MAP_TYPE_ARRAY, CALL, EXIT, LOAD_64, LOAD_WORD, MAP_LOOKUP_ELEM, MOVE, MOVE_REGISTER,
    PSEUDO_MAP_FD, PSEUDO_MAP_VALUE, STORE_WORD, SkbContext, instruction, load, test_run,
};
use crate::sys::{self, MapShape};

/// `enum bpf_map_type`.
const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_QUEUE: u32 = 22;
/// Helpers (`enum bpf_func_id`).
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_DELETE_ELEM: i32 = 3;
const MAP_PUSH_ELEM: i32 = 87;
const MAP_POP_ELEM: i32 = 88;
/// `BPF_NOEXIST`.
const NOEXIST: i32 = 1;
/// Operation codes (RFC 9669).
const OR_REGISTER: u8 = 0x4f;
const STORE_BYTE_NUMBER: u8 = 0x72;
const STORE_64_NUMBER: u8 = 0x7a;

/// Most bytes of a program's stack.
const STACK: u32 = 512;

/// Where key and half of a flow begin on the stack.
#[derive(Clone, Copy)]
struct Places {
    key: i16,
    half: i16,
}

/// Bare flows, numbered.
#[derive(Debug)]
pub struct BareFlows {
    position: OwnedFd,
    nothing: OwnedFd,
    open: OwnedFd,
    close: OwnedFd,
}

impl BareFlows {
    /// Room for so many, whose halves have keys and values of so many bytes: multiples of 8.
    ///
    /// # Errors
    /// The kernel's, and sizes that are not.
    pub fn new(flows: u32, key: u32, half: u32) -> Result<Self> {
        let is_size = |bytes: u32| bytes > 0 && bytes.is_multiple_of(8) && bytes < STACK;
        ensure!(is_size(key) && is_size(half) && key + half <= STACK, "halves of {key} and {half}");
        let places = Places { key: -(key as i16), half: -((key + half) as i16) };
        let map = |kind, key, value, entries| {
            sys::bpf_map(MapShape { kind, key, value, entries }).context("make a BPF map")
        };
        let position = map(BPF_MAP_TYPE_ARRAY, 4, 8, 1)?;
        let table = map(BPF_MAP_TYPE_HASH, key, half, 2 * flows)?;
        let queue = map(BPF_MAP_TYPE_QUEUE, 0, key, flows)?;
        let program = |steps: &[Vec<u64>]| {
            let end = vec![copy(0, 6), instruction(EXIT, 0, 0, 0, 0)];
            load(&[number(&position, places), steps.concat(), end].concat())
                .context("load a bare program")
        };
        let insert = insert(&table, places);
        let remove = call(MAP_DELETE_ELEM, &table, places.key, &[]);
        let first = [instruction(MOVE, 3, 0, 0, 0)];
        let push = call(MAP_PUSH_ELEM, &queue, places.key, &first);
        let pop = call(MAP_POP_ELEM, &queue, places.half, &[]);
        let opening = [look_up(&table, places), insert.clone(), other(), insert, push];
        let closing = [remove.clone(), other(), remove, pop];
        let (nothing, open, close) = (program(&[])?, program(&opening)?, program(&closing)?);
        Ok(Self { position, nothing, open, close })
    }

    /// Opens so many flows and closes them; returns the nanoseconds that one takes to open.
    ///
    /// # Errors
    /// The kernel's, and when there is no room.
    pub fn measure(&self, flows: u32) -> Result<f64> {
        let run = |program: &OwnedFd| -> Result<f64> {
            sys::bpf_array_set(&self.position, 0, &[0; 8]).context("begin with the first flow")?;
            let (frame, context) = ([0; 64], SkbContext::new(0, 0));
            let ran = test_run(program.as_fd(), &frame, &context, (flows, 0))?;
            ensure!(ran.verdict == 0, "the last of {flows} flows: {}", ran.verdict);
            Ok(ran.nanos.into())
        };
        let nothing = run(&self.nothing)?;
        let opened = run(&self.open)?;
        run(&self.close)?;
        Ok(opened - nothing)
    }
}

fn copy(to: u8, from: u8) -> u64 {
    instruction(MOVE_REGISTER, to, from, 0, 0)
}

fn map(register: u8, kind: u8, map: &OwnedFd) -> [u64; 2] {
    [instruction(LOAD_64, register, kind, 0, map.as_raw_fd()), instruction(0, 0, 0, 0, 0)]
}

fn stack(register: u8, at: i16) -> [u64; 2] {
    [copy(register, 10), instruction(ADD, register, 0, 0, at.into())]
}

/// Puts the number of a flow into its key and an empty half beside it; register 6 gathers errors.
fn number(position: &OwnedFd, places: Places) -> Vec<u64> {
    let mut steps = vec![instruction(MOVE, 6, 0, 0, 0)];
    steps.extend((places.half..0).step_by(8).map(|at| instruction(STORE_64_NUMBER, 10, 0, at, 0)));
    steps.extend(map(1, PSEUDO_MAP_VALUE, position));
    steps.extend([
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(STORE_WORD, 10, 2, places.key, 0),
        instruction(ADD, 2, 0, 0, 1),
        instruction(STORE_WORD, 1, 2, 0, 0),
    ]);
    steps
}

/// Goes on with the other half.
fn other() -> Vec<u64> {
    vec![instruction(STORE_BYTE_NUMBER, 10, 0, -1, 1)]
}

/// Calls a helper for a map, with what lies at `at` on the stack, and notes whether it failed.
fn call(helper: i32, subject: &OwnedFd, at: i16, more: &[u64]) -> Vec<u64> {
    let mut steps = map(1, PSEUDO_MAP_FD, subject).to_vec();
    steps.extend(stack(2, at));
    steps.extend(more);
    steps.extend([instruction(CALL, 0, 0, 0, helper), instruction(OR_REGISTER, 6, 0, 0, 0)]);
    steps
}

fn look_up(table: &OwnedFd, places: Places) -> Vec<u64> {
    let mut steps = call(MAP_LOOKUP_ELEM, table, places.key, &[]);
    // It finds nothing, which is no error, or a pointer, which is no number.
    steps.pop();
    steps
}

fn insert(table: &OwnedFd, places: Places) -> Vec<u64> {
    let [a, b] = stack(3, places.half);
    call(MAP_UPDATE_ELEM, table, places.key, &[a, b, instruction(MOVE, 4, 0, 0, NOEXIST)])
}
