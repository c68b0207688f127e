//! Making the kernel agree with a model: one pass from facts over the plan to links, backend and
//! sysctls.
//!
//! Owns the order of things, which is what keeps a container shut off until its policy is in the
//! backend. Knows nothing of who asked for the model.

use std::{collections::BTreeMap, fmt, mem, net::IpAddr, sync::Arc, time::Instant};

use anyhow::{Context, Error, Result, anyhow};
use futures::{StreamExt, stream};
use tracing::{debug, info, warn};

use super::{BLANK_PAUSE, State};
use crate::{
    dataplane::Dataplane,
    facts::HostFacts,
    model::{EndpointId, Model, Netns, NetworkId},
    netlink::{Netlink, namespace::Namespace},
    plan::{self, BridgePlan, Plan, SysctlPlan, VethPlan, blank::Blank, own},
};

/// How many containers are looked into at the same time.
const AT_ONCE: usize = 8;

/// Something that a pass could not do.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) subject: Subject,
    error: Error,
}

/// How a container's end was made right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dressed {
    /// ifindex of the host's end that it belongs to.
    ifindex: u32,
    /// Whether the container's default routes lead by it, IPv4 and IPv6.
    gateways: (bool, bool),
}

impl Dressed {
    fn new(ifindex: u32, veth: &VethPlan) -> Self {
        let has4 = veth.ipv4.is_some_and(|side| side.gateway.is_some());
        let has6 = veth.ipv6.is_some_and(|side| side.gateway.is_some());
        Self { ifindex, gateways: (has4, has6) }
    }
}

/// Links and sysctls as a pass has left them that did all it had to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Settled {
    bridges: BTreeMap<NetworkId, BridgePlan>,
    veths: BTreeMap<EndpointId, VethPlan>,
    sysctls: BTreeMap<String, SysctlPlan>,
}

/// Makes a veth pair and its container's end right.
async fn dress(
    id: EndpointId,
    netlink: &Netlink,
    veth: &VethPlan,
    netns: &Netns,
    facts: &HostFacts,
) -> (EndpointId, Result<Dressed>) {
    let dress = async || {
        let namespace = Namespace::open_same(netns)?;
        let ifindex = netlink.ensure_veth(veth, Some(&namespace), facts).await?;
        namespace.ensure_interface(veth).await?;
        Ok(Dressed::new(ifindex, veth))
    };
    (id, dress().await)
}

impl Settled {
    fn of(plan: Plan) -> Self {
        let Plan { bridges, veths, sysctls, .. } = plan;
        Self { bridges, veths, sysctls }
    }

    /// Whether a plan wants the same, so that nothing but the backend has work to do.
    fn is_of(&self, plan: &Plan) -> bool {
        let Self { bridges, veths, sysctls } = self;
        plan.orphans.is_empty()
            && plan.bridges == *bridges
            && plan.veths == *veths
            && plan.sysctls == *sysctls
    }
}

/// What a failure is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    Network(NetworkId),
    Endpoint(EndpointId),
    Backend,
    Host,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl Failure {
    pub(super) fn into_error(self) -> Error {
        self.error
    }
}

/// One pass.
struct Pass<'a> {
    model: &'a Model,
    /// The model that a change starts from. Such a pass ends at the first failure that is the
    /// change's own, while all can still be undone; a repair (`None`) does as much as can be done.
    before: Option<&'a Model>,
    failures: Vec<Failure>,
    /// Endpoints whose container's end was made right in this pass.
    dressed: Vec<EndpointId>,
}

impl Pass<'_> {
    /// Takes a failure down, or ends the pass with it.
    fn note<T>(&mut self, subject: Subject, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if self.is_own(subject) => Err(error),
            Err(error) => {
                self.failures.push(Failure { subject, error });
                Ok(None)
            }
        }
    }

    /// Whether a failure about this is to be blamed on the change. What was broken before, and is
    /// not touched, must not stand in the way of it.
    fn is_own(&self, subject: Subject) -> bool {
        let Some(before) = self.before else { return false };
        match subject {
            Subject::Network(id) => before.networks.get(&id) != self.model.networks.get(&id),
            Subject::Endpoint(id) => before.endpoints.get(&id) != self.model.endpoints.get(&id),
            Subject::Backend | Subject::Host => true,
        }
    }
}

impl State {
    /// Makes the kernel agree with `model`, as a change from `before` or as a repair, on a host that was
    /// just now as `facts` say. Returns what could not be done and is no reason to stop.
    ///
    /// # Errors
    /// The failure that ended the pass early.
    pub(super) async fn converge(
        &mut self,
        model: &Model,
        before: Option<&Model>,
        facts: HostFacts,
    ) -> Result<Vec<Failure>> {
        let mut pass = Pass { model, before, failures: Vec::new(), dressed: Vec::new() };
        self.setting.filters_bridges = self.nature.needs_bridge_filter;
        self.setting.keeps_blank = self.nature.keeps_blank;
        self.follow_renames(&facts).await?;
        let settled = self.settled.take();
        let outgoing = plan::plan(model, &facts, &self.setting);
        if before.is_some()
            && facts == self.facts
            && settled.is_some_and(|settled| settled.is_of(&outgoing))
        {
            self.apply(&mut pass, &outgoing).await?;
            // Unless the backend has given way to another one just now.
            if self.nature.needs_bridge_filter == self.setting.filters_bridges {
                self.settled = Some(Settled::of(outgoing));
                return Ok(pass.failures);
            }
        }
        // With a thousand links, to read them all is most of what a change of one costs.
        let (incoming, facts) = match self.shut(&mut pass, &outgoing, &facts).await? {
            false => (outgoing, facts),
            true => {
                let facts = self.netlink.read_facts().await?;
                (plan::plan(model, &facts, &self.setting), facts)
            }
        };
        self.make_links(&mut pass, &incoming, &facts).await?;

        let facts = self.netlink.read_facts().await?;
        let present = plan::plan(model, &facts, &self.setting);
        let is_applied = self.apply(&mut pass, &present).await?;
        let (facts, present) = self.follow_backend(&mut pass, facts, present).await?;
        if is_applied {
            self.open(&mut pass, &present, &facts).await?;
        }
        self.delete_orphans(&mut pass, &present, &facts).await?;
        if !present.orphans.is_empty() {
            self.redirect(&mut pass, &present, &facts).await?;
        }

        // Sysctls were written, which the kernel does not tell of.
        self.netlink.forget_facts();
        self.facts = self.netlink.read_facts().await?;
        let settled = plan::plan(model, &self.facts, &self.setting);
        // Addresses, and the peers of veths, that went with the orphans.
        if is_applied && settled.program != self.program {
            self.apply(&mut pass, &settled).await?;
        }
        self.settled = (pass.failures.is_empty() && is_applied).then(|| Settled::of(settled));
        Ok(pass.failures)
    }

    /// Stops traffic of what has to go while it is still being watched: once the backend has let
    /// go of a link, nothing may pass it. Returns whether there was anything.
    async fn shut(&mut self, pass: &mut Pass<'_>, plan: &Plan, facts: &HostFacts) -> Result<bool> {
        let given_back = self.give_back_sysctls(&plan.sysctls).await;
        let is_changed = !given_back.is_empty() || !plan.orphans.is_empty();
        for result in given_back {
            pass.note(Subject::Host, result)?;
        }
        for (&ifindex, link) in facts.links.iter().filter(|(i, _)| plan.orphans.contains(i)) {
            // A leftover of a start that did not finish, under a name that is needed now. Such a
            // link never carried traffic, so there is nothing to shut and nothing to undo.
            let result = if plan.names(&link.name) {
                self.netlink.delete_link(ifindex, link).await
            } else {
                self.netlink.shut_link(ifindex, link).await
            };
            pass.note(Subject::Host, result)?;
        }
        Ok(is_changed)
    }

    /// Bridges and veth pairs, all of them shut if they are new.
    async fn make_links(
        &mut self,
        pass: &mut Pass<'_>,
        plan: &Plan,
        facts: &HostFacts,
    ) -> Result<()> {
        for (&id, bridge) in &plan.bridges {
            let result = self.netlink.ensure_bridge(bridge, facts).await;
            pass.note(Subject::Network(id), result)?;
        }
        self.dressed.retain(|id, _| plan.veths.contains_key(id));
        let mut blank = plan.blank;
        for (&id, veth) in plan.veths.iter().filter(|(_, veth)| veth.netns.is_none()) {
            let result = self.offer_veth(pass, id, veth, &mut blank, facts).await;
            pass.note(Subject::Endpoint(id), result)?;
        }
        self.make_veths(pass, plan.veths.iter(), facts).await
    }

    /// Makes veth pairs and dresses those container's ends that this agent has not dressed yet.
    async fn make_veths(
        &mut self,
        pass: &mut Pass<'_>,
        veths: impl Iterator<Item = (&EndpointId, &VethPlan)>,
        facts: &HostFacts,
    ) -> Result<()> {
        let undressed = veths.filter_map(|(&id, veth)| {
            let netns = veth.netns.as_ref()?;
            // Entering a namespace costs a thread. What happens inside, once it was right, is the
            // container's own business until the pair is made anew or the agent starts again.
            let present =
                own(facts, &veth.name, &veth.alias).map(|(ifindex, _)| Dressed::new(ifindex, veth));
            let is_dressed = present.is_some() && self.dressed.get(&id).copied() == present;
            (!is_dressed).then(|| dress(id, &self.netlink, veth, netns, facts))
        });
        let undressed: Vec<_> = undressed.collect();
        // All of them, whatever fails: what is dropped in the middle goes on in its thread.
        let results: Vec<_> = stream::iter(undressed).buffered(AT_ONCE).collect().await;
        for (id, result) in results {
            if let Some(dressed) = pass.note(Subject::Endpoint(id), result)? {
                self.dressed.insert(id, dressed);
                pass.dressed.push(id);
            }
        }
        Ok(())
    }

    /// Makes a pair whose container's end an engine takes, of the blank if there is one. Only the change
    /// that adds the endpoint does: an engine that has taken the end does not come for another one.
    async fn offer_veth(
        &mut self,
        pass: &Pass<'_>,
        id: EndpointId,
        veth: &VethPlan,
        blank: &mut Option<Blank>,
        facts: &HostFacts,
    ) -> Result<()> {
        let is_new = pass.before.is_some_and(|before| !before.endpoints.contains_key(&id));
        let is_there = facts.link(&veth.name).is_some();
        if is_new
            && !is_there
            && let Some(blank) = blank.take()
        {
            self.no_blank_before = None;
            match self.netlink.give_blank(blank, veth).await {
                Ok(()) => return Ok(()),
                // Somebody has touched it meanwhile. One made anew does as well.
                Err(error) => {
                    debug!("give a pair that was made ahead: {error:#}");
                    self.netlink.discard_blank(blank).await?;
                }
            }
        }
        if is_new || is_there {
            self.netlink.ensure_veth(veth, None, facts).await?;
        }
        Ok(())
    }

    /// Makes the blank and has the backend see to it. Looks at nothing else, which would take long where
    /// there is much, and leaves what has changed meanwhile to the next look.
    pub(super) async fn make_blank(&mut self) -> Result<()> {
        self.no_blank_before = Some(Instant::now() + BLANK_PAUSE);
        let ends = self.netlink.make_blank().await?;
        self.facts.links.extend(ends);
        let model = Arc::clone(&self.model);
        let plan = plan::plan(&model, &self.facts, &self.setting);
        let mut pass =
            Pass { model: &model, before: None, failures: Vec::new(), dressed: Vec::new() };
        let failure = match self.apply(&mut pass, &plan).await {
            Ok(true) => return Ok(()),
            Ok(false) => pass.failures.pop().map(Failure::into_error),
            Err(error) => Some(error),
        };
        // Every change would fail with it.
        if let Some(blank) = plan.blank {
            self.netlink.discard_blank(blank).await?;
        }
        Err(failure.unwrap_or_else(|| anyhow!("the backend did not take it")))
    }

    /// Gives containers the default routes that have gone with an interface of theirs: when theirs
    /// was made right, that one may still have been there.
    async fn redirect(
        &mut self,
        pass: &mut Pass<'_>,
        plan: &Plan,
        facts: &HostFacts,
    ) -> Result<()> {
        let dressed = mem::take(&mut pass.dressed);
        self.dressed.retain(|id, _| !dressed.contains(id));
        let veths = dressed.iter().filter_map(|id| plan.veths.get_key_value(id));
        self.make_veths(pass, veths, facts).await
    }

    /// A backend that has just given way to another one may leave bridges that don't go by that: puts
    /// them right before anything is opened.
    async fn follow_backend(
        &mut self,
        pass: &mut Pass<'_>,
        facts: HostFacts,
        present: Plan,
    ) -> Result<(HostFacts, Plan)> {
        let filters = self.nature.needs_bridge_filter;
        if filters == self.setting.filters_bridges {
            return Ok((facts, present));
        }
        self.setting.filters_bridges = filters;
        self.setting.keeps_blank = self.nature.keeps_blank;
        let present = plan::plan(pass.model, &facts, &self.setting);
        self.make_links(pass, &present, &facts).await?;
        let facts = self.netlink.read_facts().await?;
        let present = plan::plan(pass.model, &facts, &self.setting);
        Ok((facts, present))
    }

    /// `true` if the backend enforces the plan's program now.
    async fn apply(&mut self, pass: &mut Pass<'_>, plan: &Plan) -> Result<bool> {
        let wanted = Arc::clone(&plan.program);
        let apply = move |dataplane: &mut Box<dyn Dataplane>| {
            let applied = dataplane.apply(&wanted);
            (applied, dataplane.nature())
        };
        let (applied, nature) = self.dataplane.call(apply).await?;
        self.nature = nature;
        let applied = applied.context("apply the program to the dataplane");
        let Some(applied) = pass.note(Subject::Backend, applied)? else { return Ok(false) };
        if applied.writes > 0 {
            debug!(writes = applied.writes, "applied the program to the dataplane");
        }
        self.program = Arc::clone(&plan.program);
        Ok(true)
    }

    /// Lets packets through, now that the backend knows what to do with them.
    async fn open(&mut self, pass: &mut Pass<'_>, plan: &Plan, facts: &HostFacts) -> Result<()> {
        let mut neighbours = BTreeMap::new();
        let mut opened = Vec::new();
        for (&id, bridge) in &plan.bridges {
            let Some(program) = plan.program.networks.get(&id) else { continue };
            let result = self.netlink.open_bridge(bridge, facts).await;
            if pass.note(Subject::Network(id), result)?.is_some() {
                neighbours.insert(program.bridge_ifindex, BTreeMap::new());
            }
        }
        for (&id, veth) in &plan.veths {
            let Some(program) = plan.program.endpoints.get(&id) else { continue };
            let result = self.netlink.open_veth(veth, facts).await;
            let is_new = pass.note(Subject::Endpoint(id), result)?;
            // An engine sets up its container's end when it pleases.
            if is_new == Some(true) && veth.netns.is_some() {
                opened.push(program.ifindex);
            }
            let bridge = plan.program.networks.get(&program.network);
            if let Some(entries) =
                bridge.and_then(|bridge| neighbours.get_mut(&bridge.bridge_ifindex))
            {
                let ipv4 = program.ipv4.map(IpAddr::V4);
                let addresses = ipv4.into_iter().chain(program.ipv6.map(IpAddr::V6));
                entries.extend(addresses.map(|address| (address, program.mac)));
            }
        }
        let result = self.netlink.ensure_neighbours(&neighbours).await;
        pass.note(Subject::Host, result)?;
        for result in self.ensure_sysctls(&plan.sysctls).await {
            pass.note(Subject::Host, result)?;
        }
        self.netlink.await_carrier(&opened).await;
        Ok(())
    }

    async fn delete_orphans(
        &mut self,
        pass: &mut Pass<'_>,
        plan: &Plan,
        facts: &HostFacts,
    ) -> Result<()> {
        for (&ifindex, link) in facts.links.iter().filter(|(i, _)| plan.orphans.contains(i)) {
            debug!(
                interface = link.name,
                alias = link.alias,
                "deleting an interface of ours that the model does not name"
            );
            let result = self.netlink.delete_link(ifindex, link).await;
            pass.note(Subject::Host, result)?;
        }
        Ok(())
    }

    /// Keeps what a repair could not do for the operator to see, and logs it once.
    pub(super) fn report(&mut self, troubles: Vec<String>) {
        for trouble in troubles.iter().filter(|trouble| !self.troubles.contains(trouble)) {
            warn!("{trouble}");
        }
        if troubles.is_empty() && !self.troubles.is_empty() {
            info!("the kernel agrees with the model again");
        }
        self.troubles = troubles;
    }
}
