//! User policy: the grammar of a rule and the operations on a network's rules.
//!
//! ```text
//! # comment
//! allow|deny from ADDRESS|CIDR|FIRST-LAST|any
//! ```
//!
//! Addresses are of either family; `any` means both. Owns text ↔ [`PolicyRule`]. Knows nothing of
//! how a backend matches.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv4Subnets, Ipv6Net, Ipv6Subnets};

use super::{Action, Model, Network, PolicyRule, Refusal, Rule, Source};

/// Every IPv4 address.
const ALL_IPV4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0);
/// Every IPv6 address.
const ALL_IPV6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0);

/// Bad lines that one refusal names; the rest is counted.
const REPORTED_LINES: usize = 10;

/// Reads a whole policy: one rule per line, blank lines and `#` comments skipped.
///
/// # Errors
/// Names every line that is no rule, with its number and the reason.
pub fn parse(text: &str) -> Result<Vec<PolicyRule>, Refusal> {
    let mut rules = Vec::new();
    let mut errors = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let rule = line.split('#').next().unwrap_or_default().trim();
        if rule.is_empty() {
            continue;
        }
        match rule.parse() {
            Ok(rule) => rules.push(rule),
            Err(Refusal { message, .. }) => errors.push(format!("line {}: {message}", index + 1)),
        }
    }
    if errors.is_empty() {
        return Ok(rules);
    }
    let more = errors.len().saturating_sub(REPORTED_LINES);
    errors.truncate(REPORTED_LINES);
    if more > 0 {
        errors.push(format!("and {more} more bad lines"));
    }
    Err(Refusal::invalid(errors.join("; ")))
}

impl FromStr for PolicyRule {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let (action, source) = match words[..] {
            ["allow", "from", source] => (Action::Allow, source),
            ["deny", "from", source] => (Action::Deny, source),
            _ => {
                return Err(Refusal::invalid(format!(
                    "{text:?} is no rule: write `allow|deny from ADDRESS|CIDR|FIRST-LAST|any`"
                )));
            }
        };
        let source = parse_source(source).map_err(Refusal::invalid)?;
        Ok(Self { action, source })
    }
}

fn parse_source(source: &str) -> Result<Source, String> {
    if source == "any" {
        return Ok(Source::Any);
    }
    if let Some((first, last)) = source.split_once('-') {
        let range = Source::range(parse_address(first)?, parse_address(last)?);
        let range = range.ok_or_else(|| {
            format!("the range {source} mixes IPv4 and IPv6: give one for each of them")
        })?;
        if range.is_empty() {
            return Err(format!("the range {source} is empty: write {last}-{first}"));
        }
        return Ok(range);
    }
    if source.contains('/') {
        let net: IpNet = source.parse().map_err(|_| {
            format!("{source:?} is no CIDR: write one like 192.0.2.0/24 or 2001:db8::/32")
        })?;
        if net.addr() != net.network() {
            return Err(format!("{source} has host bits set: write {}", net.trunc()));
        }
        return Ok(net.into());
    }
    match parse_address(source)? {
        IpAddr::V4(address) => Ok(Source::Ipv4(address, address)),
        IpAddr::V6(address) => Ok(Source::Ipv6(address, address)),
    }
}

fn parse_address(text: &str) -> Result<IpAddr, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is no IP address: write one like 192.0.2.1 or 2001:db8::1"))
}

impl From<IpNet> for Source {
    fn from(net: IpNet) -> Self {
        match net {
            IpNet::V4(net) => Self::Ipv4(net.network(), net.broadcast()),
            IpNet::V6(net) => Self::Ipv6(net.network(), net.broadcast()),
        }
    }
}

impl Source {
    /// From the first to the last address; `None` where they are of different families.
    pub fn range(first: IpAddr, last: IpAddr) -> Option<Self> {
        match (first, last) {
            (IpAddr::V4(first), IpAddr::V4(last)) => Some(Self::Ipv4(first, last)),
            (IpAddr::V6(first), IpAddr::V6(last)) => Some(Self::Ipv6(first, last)),
            _ => None,
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Any => false,
            Self::Ipv4(first, last) => first > last,
            Self::Ipv6(first, last) => first > last,
        }
    }
}

impl PolicyRule {
    /// What it says in each family that it is about.
    pub fn rules(&self) -> impl Iterator<Item = Rule> {
        let ranges: [Option<(IpAddr, IpAddr)>; 2] = match self.source {
            Source::Any => [
                Some((ALL_IPV4.network().into(), ALL_IPV4.broadcast().into())),
                Some((ALL_IPV6.network().into(), ALL_IPV6.broadcast().into())),
            ],
            Source::Ipv4(first, last) => [Some((first.into(), last.into())), None],
            Source::Ipv6(first, last) => [None, Some((first.into(), last.into()))],
        };
        let action = self.action;
        ranges.into_iter().flatten().map(move |(first, last)| Rule { action, first, last })
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

impl fmt::Display for PolicyRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {}", self.action, self.source)
    }
}

/// As short as it can be said: an address, a prefix, a range.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (range, prefixes): (_, [Option<IpNet>; 2]) = match *self {
            Self::Any => return f.write_str("any"),
            Self::Ipv4(first, last) if first == last => return write!(f, "{first}"),
            Self::Ipv6(first, last) if first == last => return write!(f, "{first}"),
            Self::Ipv4(first, last) => {
                let mut nets = Ipv4Subnets::new(first, last, 0).map(IpNet::V4);
                (format!("{first}-{last}"), [nets.next(), nets.next()])
            }
            Self::Ipv6(first, last) => {
                let mut nets = Ipv6Subnets::new(first, last, 0).map(IpNet::V6);
                (format!("{first}-{last}"), [nets.next(), nets.next()])
            }
        };
        match prefixes {
            [Some(net), None] => write!(f, "{net}"),
            _ => f.write_str(&range),
        }
    }
}

impl Model {
    /// Replaces a network's rules. The same rules again are no change.
    ///
    /// # Errors
    /// Refuses an unknown network.
    pub fn set_policy(&mut self, network: &str, rules: Vec<PolicyRule>) -> Result<(), Refusal> {
        let network = self.network_mut(network)?;
        if network.policy != rules {
            network.replace_policy(rules);
        }
        Ok(())
    }

    /// Appends rules.
    ///
    /// # Errors
    /// Refuses an unknown network, and an empty list.
    pub fn add_rules(&mut self, network: &str, rules: &[PolicyRule]) -> Result<(), Refusal> {
        let network = self.network_mut(network)?;
        if rules.is_empty() {
            return Err(Refusal::invalid("no rule given: give at least one"));
        }
        let mut policy = network.policy.clone();
        policy.extend_from_slice(rules);
        network.replace_policy(policy);
        Ok(())
    }

    /// Removes the rule with this number, counted from 1.
    ///
    /// # Errors
    /// Refuses an unknown network, and a number that no rule has.
    pub fn remove_rule(&mut self, network: &str, number: usize) -> Result<PolicyRule, Refusal> {
        let network = self.network_mut(network)?;
        let mut policy = network.policy.clone();
        let index =
            number.checked_sub(1).filter(|&index| index < policy.len()).ok_or_else(|| {
                Refusal::not_found(format!(
                    "network {:?} has no rule {number}: it has {}, numbered from 1",
                    network.name,
                    policy.len()
                ))
            })?;
        let removed = policy.remove(index);
        network.replace_policy(policy);
        Ok(removed)
    }
}

impl Network {
    fn replace_policy(&mut self, rules: Vec<PolicyRule>) {
        self.policy = rules;
        self.policy_generation = self.policy_generation.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{RefusalKind, tests::model_with_network};

    #[track_caller]
    fn check(rule: &str, ranges: &[(&str, &str)]) {
        let parsed: PolicyRule = rule.parse().unwrap();
        let found: Vec<_> = parsed.rules().map(|rule| (rule.first, rule.last)).collect();
        let expected: Vec<(IpAddr, IpAddr)> = ranges
            .iter()
            .map(|(first, last)| (first.parse().unwrap(), last.parse().unwrap()))
            .collect();
        assert_eq!(found, expected, "{rule}");
        assert!(parsed.rules().all(|rule| rule.action == parsed.action), "{rule}");
        assert_eq!(parsed.to_string(), rule.split_whitespace().collect::<Vec<_>>().join(" "));
    }

    #[track_caller]
    fn check_refused(policy: &str, message: &str) {
        let refusal = parse(policy).unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::Invalid);
        assert_eq!(refusal.message, message);
    }

    #[test]
    fn every_form_of_source_is_read_and_written() {
        const LAST: &str = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        check("allow from 192.0.2.1", &[("192.0.2.1", "192.0.2.1")]);
        check("deny  from\t192.0.2.0/24", &[("192.0.2.0", "192.0.2.255")]);
        check("allow from 192.0.2.1-192.0.2.3", &[("192.0.2.1", "192.0.2.3")]);
        check("deny from 0.0.0.0/1", &[("0.0.0.0", "127.255.255.255")]);
        check("deny from 0.0.0.0/0", &[("0.0.0.0", "255.255.255.255")]);
        check("allow from 2001:db8::1", &[("2001:db8::1", "2001:db8::1")]);
        check("allow from fd00::/16", &[("fd00::", "fd00:ffff:ffff:ffff:ffff:ffff:ffff:ffff")]);
        check("deny from fd00::1-fd00::3", &[("fd00::1", "fd00::3")]);
        check("deny from ::/0", &[("::", LAST)]);
        check("deny from any", &[("0.0.0.0", "255.255.255.255"), ("::", LAST)]);
    }

    #[test]
    fn comments_and_blank_lines_are_no_rules() {
        let policy = "# office\n\n  allow from 192.0.2.1 # desk\n\t\r\ndeny from any";
        let rules: Vec<_> = parse(policy).unwrap().iter().map(PolicyRule::to_string).collect();
        assert_eq!(rules, ["allow from 192.0.2.1", "deny from any"]);
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn bad_lines_are_named_with_their_reasons() {
        check_refused(
            "permit from any\nallow from any\n\nallow from 300.1.1.1\ndeny from 10.0.0.5/8",
            "line 1: \"permit from any\" is no rule: \
             write `allow|deny from ADDRESS|CIDR|FIRST-LAST|any`; \
             line 4: \"300.1.1.1\" is no IP address: write one like 192.0.2.1 or 2001:db8::1; \
             line 5: 10.0.0.5/8 has host bits set: write 10.0.0.0/8",
        );
        check_refused(
            "deny from 10.0.0.9-10.0.0.1",
            "line 1: the range 10.0.0.9-10.0.0.1 is empty: write 10.0.0.1-10.0.0.9",
        );
        check_refused(
            "deny from fd00::9-fd00::1\nallow from fd00::1/64\nallow from 10.0.0.1-fd00::1",
            "line 1: the range fd00::9-fd00::1 is empty: write fd00::1-fd00::9; \
             line 2: fd00::1/64 has host bits set: write fd00::/64; \
             line 3: the range 10.0.0.1-fd00::1 mixes IPv4 and IPv6: give one for each of them",
        );
        check_refused(
            "allow from 10.0.0.0/33",
            "line 1: \"10.0.0.0/33\" is no CIDR: \
             write one like 192.0.2.0/24 or 2001:db8::/32",
        );
    }

    #[test]
    fn a_flood_of_bad_lines_is_cut_short() {
        let message = parse(&"x\n".repeat(25)).unwrap_err().message;
        assert!(message.ends_with("; and 15 more bad lines"), "{message}");
        assert!(!message.contains("line 11:"), "{message}");
    }

    #[test]
    fn the_generation_moves_with_every_change_and_only_then() {
        let mut model = model_with_network("a");
        let generation = |model: &Model| model.network("a").unwrap().policy_generation;
        let rules = parse("allow from 192.0.2.1\ndeny from any").unwrap();

        model.set_policy("a", rules.clone()).unwrap();
        let first = generation(&model);
        model.set_policy("a", rules.clone()).unwrap();
        assert_eq!(generation(&model), first);

        model.add_rules("a", &rules[..1]).unwrap();
        assert_eq!(generation(&model), first + 1);
        assert_eq!(model.remove_rule("a", 2).unwrap(), rules[1]);
        assert_eq!(generation(&model), first + 2);
        assert_eq!(model.network("a").unwrap().policy, [rules[0], rules[0]]);
    }

    #[test]
    fn numbers_without_a_rule_and_unknown_networks_are_refused() {
        let mut model = model_with_network("a");
        model.add_rules("a", &parse("deny from any").unwrap()).unwrap();
        for number in [0, 2, usize::MAX] {
            let refusal = model.remove_rule("a", number).unwrap_err();
            assert_eq!(refusal.kind, RefusalKind::NotFound, "{number}");
        }
        assert_eq!(model.add_rules("a", &[]).unwrap_err().kind, RefusalKind::Invalid);
        assert_eq!(model.set_policy("b", Vec::new()).unwrap_err().kind, RefusalKind::NotFound);
    }

    proptest! {
        #[test]
        fn a_rule_reads_as_it_was_written(
            a in any::<u128>(),
            b in any::<u128>(),
            deny in any::<bool>(),
        ) {
            let action = if deny { Action::Deny } else { Action::Allow };
            let (a4, b4) = (a as u32, b as u32);
            let ipv4 = Source::Ipv4(a4.min(b4).into(), a4.max(b4).into());
            let ipv6 = Source::Ipv6(a.min(b).into(), a.max(b).into());
            for source in [Source::Any, ipv4, ipv6] {
                let rule = PolicyRule { action, source };
                prop_assert_eq!(rule.to_string().parse::<PolicyRule>(), Ok(rule));
            }
        }

        #[test]
        fn a_prefix_reads_as_it_was_written(address in any::<u128>(), prefix in 0u8..128) {
            let ipv4 = Ipv4Net::new((address as u32).into(), prefix / 4).unwrap().trunc();
            let ipv6 = Ipv6Net::new(address.into(), prefix).unwrap().trunc();
            for net in [IpNet::V4(ipv4), IpNet::V6(ipv6)] {
                let rule = PolicyRule { action: Action::Allow, source: net.into() };
                prop_assert_eq!(rule.to_string(), format!("allow from {net}"));
                prop_assert_eq!(rule.to_string().parse::<PolicyRule>(), Ok(rule));
            }
        }

        #[test]
        fn no_text_upsets_the_parser(text in "(allow|deny|from|any|[0-9a-f./ :#\n-]|\\PC){0,40}") {
            let _ = parse(&text);
        }
    }
}
